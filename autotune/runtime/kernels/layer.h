// A decoder layer of prefill in two operators, with the cache and attention between them, and all layers of a prompt in
// one. Each gives, to the bit, what the operators for its parts give; it lays a token's numbers out once for all the
// products that use them.
//
//   layer_heads   x -> norm -> queries, keys and values, rotated
//   layer_end     x, attention -> x + o(attention) -> that + mlp(norm(that))
//   layers        x -> the two, with attention over the layer's own keys and values between them, layer by layer,
//                 over addresses that `layer_table` looked up once
//
// A kind of products is a class with
//
//   Laid, reserve(linear, rows, scratch) rows laid out for products
//   kRows, lay(laid, first, rows, ...)   lays out so many rows at once, or the last ones
//   divides(rows)                        whether its loops over so many rows are all divided by `on_threads`
//   require(linear)                      refuses weights that it does not multiply
//   close(laid)                          what remains to be done once all rows are laid out
//   multiply(laid, linear, y)            y = x W^T + b
//   mlp(laid, gate, up, down, y)         y = down(activation(gate(x)) * up(x))
#pragma once

#include <cstring>
#include <tuple>
#include <type_traits>

#include "attend_many.h"
#include "curves.h"
#include "matmul.h"
#include "token_rows.h"

namespace autotune {
namespace {

using Parts = std::vector<Tensor>;  // a weight as stored: its numbers, its scales and its zeros
using Maybe = std::optional<Tensor>;

// A linear layer.
struct Linear {
  Matrix w;
  int bits;
  ScalarType type;    // that its numbers are stored in
  const float* bias;  // or null
};

// An RMS norm, or none.
struct Norm {
  const float* at;
  float eps;

  explicit operator bool() const { return at; }
  void row(const float* from, int64_t width, float* to) const { rms_row(from, at, eps, width, to); }
};

// What an operator is given of layers. It keeps copies in FP32 where that is needed.
class Given {
 public:
  Norm norm(const Maybe& weight, double eps, int64_t width) {
    if (!weight) return {nullptr, 0};
    STD_TORCH_CHECK(weight->numel() == width, "the norm has ", weight->numel(), " weights for ", width, " numbers");
    return {kept(*weight), static_cast<float>(eps)};
  }
  Linear linear(const Parts& weight, const Maybe& bias, int64_t outputs, int64_t inputs) {
    const Matrix w = stored(weight, outputs, inputs);
    return {w, bits_of(weight[0].scalar_type()), weight[0].scalar_type(), this->bias(bias, outputs)};
  }
  const float* bias(const Maybe& given, int64_t outputs) {
    if (!given) return nullptr;
    STD_TORCH_CHECK(given->numel() == outputs, "the bias has ", given->numel(), " numbers for ", outputs, " outputs");
    return kept(*given);
  }

 private:
  const float* kept(const Tensor& t) {
    kept_.push_back(contiguous_floats(t));
    return floats(kept_.back());
  }
  std::vector<Tensor> kept_;
};

// Lays out rows of `width` numbers, each written by make(row, to), on all threads.
template <class Kind, class Make>
void lay_made(const typename Kind::Laid& to, int64_t rows, int64_t width, Make make) {
  on_threads(0, (rows + Kind::kRows - 1) / Kind::kRows, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch<float> scratch;
    float* made = scratch.room(Kind::kRows * width);
    for (int64_t first = begin * Kind::kRows; first < std::min(rows, end * Kind::kRows); first += Kind::kRows) {
      const int64_t count = std::min(Kind::kRows, rows - first);
      for (int64_t i = 0; i < count; ++i) make(first + i, made + i * width);
      Kind::lay(to, first, count, made, width);
    }
  });
  Kind::close(to);
}

// Lays out rows that lie one after the other.
template <class Kind>
void lay_all(const typename Kind::Laid& to, const float* x, int64_t rows, int64_t width) {
  on_threads(0, (rows + Kind::kRows - 1) / Kind::kRows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * Kind::kRows; at < std::min(rows, end * Kind::kRows); at += Kind::kRows)
      Kind::lay(to, at, std::min(Kind::kRows, rows - at), x + at * width, width);
  });
  Kind::close(to);
}

// What a layer multiplies and scales by.
struct LayerWeights {
  Norm before, of_q, of_k, after;
  Linear q, k, v, o, gate, up, down;
};

// Queries, keys and values of a layer, [B, H, S, D] laid out by token.
struct Heads {
  Tensor queries, keys, values;

  static Heads room(const Tensor& x, int64_t outputs, int64_t key_outputs, int64_t depth) {
    const auto made = [&](int64_t all) { return empty_by_token(x.size(0), all / depth, x.size(1), depth); };
    return {made(outputs), made(key_outputs), made(key_outputs)};
  }
};

template <class Kind>
void heads(const Kind& kind, const Tensor& x, const Norm& norm, const Linear& q, const Linear& k, const Linear& v,
           const Norm& q_norm, const Norm& k_norm, const Tensor& cosines, const Tensor& sines, const Heads& to) {
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2), depth = cosines.size(2);
  static thread_local Scratch<typename Kind::Unit> scratch;
  const auto laid = kind.reserve(q, batch * tokens, scratch);
  lay_made<Kind>(laid, batch * tokens, width,
                 [&](int64_t row, float* to) { norm.row(floats(x) + row * width, width, to); });
  kind.multiply(laid, q, to.queries);
  kind.multiply(laid, k, to.keys);
  kind.multiply(laid, v, to.values);
  const int64_t shared = cosines.size(0) == 1 ? 0 : tokens * depth;  // one set of angles for all sequences, or one each
  for_rows(batch * tokens, q.w.outputs + k.w.outputs, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t angle = row / tokens * shared + row % tokens * depth;
      const auto turn = [&](const Tensor& y, const Norm& own, int64_t outputs) {
        float* from = floats(y) + row * outputs;
        for (float* at = from; at < from + outputs; at += depth) {
          if (own) own.row(at, depth, at);
          rotate(at, floats(cosines) + angle, floats(sines) + angle, depth, at);
        }
      };
      turn(to.queries, q_norm, q.w.outputs);
      turn(to.keys, k_norm, k.w.outputs);
    }
  });
}

template <class Kind>
Tensor finish(const Kind& kind, const Tensor& x, const Tensor& attended, const Linear& o, const Norm& norm,
              const Linear& gate, const Linear& up, const Linear& down) {
  const int64_t width = x.size(2), rows = x.size(0) * x.size(1), inner = o.w.inputs;
  static thread_local Scratch<typename Kind::Unit> first, second;
  const Tensor y = empty_floats({x.size(0), x.size(1), width}), h = empty_floats({rows, width});
  const auto read = kind.reserve(o, rows, first);
  lay_all<Kind>(read, floats(attended), rows, inner);
  kind.multiply(read, o, h);
  const auto add = [width](const float* a, float* to) {
    int64_t i = 0;
    for (; i + kWidth <= width; i += kWidth) store(to + i, load<Floats>(a + i) + load<Floats>(to + i));
    for (; i < width; ++i) to[i] = a[i] + to[i];
  };
  const auto laid = kind.reserve(gate, rows, second);
  lay_made<Kind>(laid, rows, width, [&](int64_t row, float* to) {
    add(floats(x) + row * width, floats(h) + row * width);
    norm.row(floats(h) + row * width, width, to);
  });
  kind.mlp(laid, gate, up, down, y);
  for_rows(rows, width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) add(floats(h) + row * width, floats(y) + row * width);
  });
  return y;
}

// Checks the numbers that a layer is given, [B, S, N], and returns them contiguous.
inline Tensor tokens_of(const Tensor& x, int64_t dims) {
  STD_TORCH_CHECK(x.dim() == dims && x.scalar_type() == ScalarType::Float && x.numel() > 0,
                  "expected FP32 numbers of one token or more");
  return contiguous_floats(x);
}

inline void require_angles(const Tensor& x, const Tensor& cosines, const Tensor& sines, int64_t outputs,
                           int64_t key_outputs) {
  const int64_t depth = cosines.size(2);
  STD_TORCH_CHECK((cosines.size(0) == 1 || cosines.size(0) == x.size(0)) && cosines.size(1) == x.size(1) &&
                      depth % 2 == 0 && sines.numel() == cosines.numel() && outputs % depth == 0 && key_outputs % depth == 0,
                  "cosines and sines must be [B or 1, S, D], D even and a divisor of the outputs");
}

// What all layers of a table have alike. Their weights lie behind it.
struct Sizes {
  int64_t layers, width, depth, outputs, key_outputs;
};
static_assert(std::is_trivially_copyable_v<LayerWeights> && sizeof(Sizes) % alignof(LayerWeights) == 0);

inline std::pair<Sizes, const LayerWeights*> layers_in(const Tensor& table) {
  const int64_t bytes = table.numel(), own = sizeof(Sizes), each = sizeof(LayerWeights);
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Byte && table.is_contiguous() && bytes > own && (bytes - own) % each == 0,
                  "the table must be one that `layer_table` made");
  const uint8_t* at = static_cast<const uint8_t*>(present(table).data_ptr());
  Sizes sizes;
  std::memcpy(&sizes, at, own);
  STD_TORCH_CHECK(sizes.layers == (bytes - own) / each, "the table must be one that `layer_table` made");
  return {sizes, reinterpret_cast<const LayerWeights*>(at + own)};
}

// The operators for a family of products: `Family::with(precision, activation, use)` calls use(kind).
template <class Family>
std::tuple<Tensor, Tensor, Tensor> layer_heads(const Tensor& given, const Tensor& norm, double eps, const Parts& q,
                                               const Parts& k, const Parts& v, const Maybe& q_bias, const Maybe& k_bias,
                                               const Maybe& v_bias, const Maybe& q_norm, const Maybe& k_norm,
                                               double head_eps, int64_t outputs, int64_t key_outputs,
                                               const Tensor& cosines, const Tensor& sines, int64_t precision) {
  const Tensor x = tokens_of(given, 3), cosine = tokens_of(cosines, 3), sine = tokens_of(sines, 3);
  const int64_t width = x.size(2), depth = cosine.size(2);
  require_angles(x, cosine, sine, outputs, key_outputs);
  Given read;
  const Linear one = read.linear(q, q_bias, outputs, width), two = read.linear(k, k_bias, key_outputs, width),
               three = read.linear(v, v_bias, key_outputs, width);
  const Norm before = read.norm(norm, eps, width), of_q = read.norm(q_norm, head_eps, depth),
             of_k = read.norm(k_norm, head_eps, depth);
  const Heads found = Heads::room(x, outputs, key_outputs, depth);
  Family::with(precision, kSilu, [&](const auto& kind) {
    for (const Linear* each : {&one, &two, &three}) kind.require(*each);
    heads(kind, x, before, one, two, three, of_q, of_k, cosine, sine, found);
  });
  return {found.queries, found.keys, found.values};
}

template <class Family>
Tensor layer_end(const Tensor& given, const Tensor& attention, const Parts& o, const Maybe& o_bias, const Tensor& norm,
                 double eps, const Parts& gate, const Parts& up, const Parts& down, const Maybe& gate_bias,
                 const Maybe& up_bias, const Maybe& down_bias, int64_t hidden, int64_t activation, int64_t precision) {
  const Tensor x = tokens_of(given, 3), attended = tokens_of(attention, 4);
  const int64_t width = x.size(2), inner = attended.numel() / (x.size(0) * x.size(1));
  STD_TORCH_CHECK(attended.size(0) == x.size(0) && attended.size(1) == x.size(1), "attention must be [B, S, H, D]");
  Given read;
  const Linear first = read.linear(o, o_bias, width, inner), second = read.linear(gate, gate_bias, hidden, width),
               third = read.linear(up, up_bias, hidden, width), last = read.linear(down, down_bias, width, hidden);
  const Norm after = read.norm(norm, eps, width);
  return Family::with(precision, activation, [&](const auto& kind) {
    for (const Linear* each : {&first, &second, &third, &last}) kind.require(*each);
    return finish(kind, x, attended, first, after, second, third, last);
  });
}

// Runs the layers of a table that `layer_table` made. Also returns their keys and values, [L, B, Hk, S, D] laid out by
// token.
template <class Family>
std::tuple<Tensor, Tensor, Tensor> layers(const Tensor& given, const Tensor& table, int64_t count, int64_t key_outputs,
                                          const Tensor& cosines, const Tensor& sines, const Maybe& spans, double scale,
                                          int64_t parts, int64_t activation, int64_t precision) {
  const Tensor cosine = tokens_of(cosines, 3), sine = tokens_of(sines, 3);
  Tensor x = tokens_of(given, 3);
  const int64_t batch = x.size(0), tokens = x.size(1);
  const auto [sizes, weights] = layers_in(table);
  STD_TORCH_CHECK(sizes.layers == count && sizes.key_outputs == key_outputs && sizes.width == x.size(2) &&
                      sizes.depth == cosine.size(2),
                  "the table is of other layers");
  require_angles(x, cosine, sine, sizes.outputs, key_outputs);
  const int64_t depth = sizes.depth;
  const auto room = [&] { return empty_by_token(count * batch, key_outputs / depth, tokens, depth); };
  const Tensor keys = by_layer(room(), count), values = by_layer(room(), count);
  Family::with(precision, activation, [&, weights = weights, outputs = sizes.outputs](const auto& kind) {
    const auto compute = [&] {
      for (int64_t n = 0; n < count; ++n) {
        const LayerWeights& w = weights[n];
        for (const Linear* each : {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down}) kind.require(*each);
        const Heads found{empty_by_token(batch, outputs / depth, tokens, depth), part_of(keys, n), part_of(values, n)};
        heads(kind, x, w.before, w.q, w.k, w.v, w.of_q, w.of_k, cosine, sine, found);
        const Tensor attended = attend_many(found.queries, found.keys, found.values, spans, scale, parts);
        x = finish(kind, x, attended, w.o, w.after, w.gate, w.up, w.down);
      }
    };
    kind.divides(batch * tokens) ? in_gang(compute) : compute();
  });
  return {x, keys, values};
}

constexpr const char* kLayers =
    "(Tensor x, Tensor table, int layers, int key_features, Tensor cosines, Tensor sines, Tensor? spans, float scale, "
    "int attention_parts, int activation, int precision) -> (Tensor, Tensor, Tensor)";
constexpr const char* kLayerHeads =
    "(Tensor x, Tensor norm, float eps, Tensor[] q, Tensor[] k, Tensor[] v, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, "
    "Tensor? q_norm, Tensor? k_norm, float head_eps, int out_features, int key_features, Tensor cosines, Tensor sines, "
    "int precision) -> (Tensor, Tensor, Tensor)";
constexpr const char* kLayerEnd =
    "(Tensor x, Tensor attended, Tensor[] o, Tensor? o_bias, Tensor norm, float eps, Tensor[] gate, Tensor[] up, "
    "Tensor[] down, Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, int hidden, int activation, int precision) -> "
    "Tensor";

}  // namespace
}  // namespace autotune
