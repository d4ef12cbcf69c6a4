// Attention of many new tokens, each over an unbroken span of keys. Causal, left-padded and windowed masks give such
// spans. Scores exist for 32 queries and some keys at a time. Keys that no query of a block may see are skipped.
// Source: Dao, Fu, Ermon, Rudra and Re, "FlashAttention", NeurIPS 2022.
#include "attend_many.h"

#include "bf16.h"
#include "curves.h"
#include "gang.h"
#include "singles.h"

#include <cmath>
#include <limits>

namespace autotune {
namespace {

constexpr int64_t kTogether = 256;  // keys whose scores are held at once
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Rows {  // the rows of one tensor [B, H, T, D]
  const float* at;
  int64_t batch, head, token;  // strides in numbers
  const float* row(int64_t b, int64_t h, int64_t t) const { return at + b * batch + h * head + t * token; }
};

struct Queries {
  Rows query, key, value;
  int64_t batch, heads, key_heads, count, keys, depth, value_depth;
  const int32_t* spans;  // [B or 1, Q, 2], the first key and the one after the last; null: all up to the query's own
  int64_t spans_batch;
  float scale;

  int64_t blocks() const { return blocks_of(count); }
  int64_t wide() const { return blocks_of(value_depth) * kSide; }
  int64_t begin(int64_t b, int64_t q) const { return spans ? spans[b * spans_batch + 2 * q] : 0; }
  int64_t end(int64_t b, int64_t q) const { return spans ? spans[b * spans_batch + 2 * q + 1] : q + 1; }
};

// Keys and values of every key head, laid out for products.
template <class Engine>
struct Laid {
  using Unit = typename Engine::Unit;
  Unit *keys, *values;
  int64_t key_blocks, depth_chunks, value_blocks;

  int64_t key_units() const { return key_blocks * depth_chunks * Engine::kPanelUnits; }
  int64_t value_units() const { return value_blocks * key_blocks * Engine::kPanelUnits; }
  Unit* key_panel(int64_t head, int64_t block) const {
    return keys + head * key_units() + block * depth_chunks * Engine::kPanelUnits;
  }
  Unit* value_panel(int64_t head, int64_t column, int64_t block) const {
    return values + head * value_units() + (column * key_blocks + block) * Engine::kPanelUnits;
  }
};

template <class Engine>
void lay(const Queries& p, const Laid<Engine>& laid, int64_t head, int64_t block) {
  const int64_t b = head / p.key_heads, h = head % p.key_heads, first = block * kSide;
  for (int half = 0; half < 2; ++half) {
    const int64_t here = std::clamp<int64_t>(p.keys - first - half * kHalf, 0, kHalf);
    const float* key = here ? p.key.row(b, h, first + half * kHalf) : nullptr;
    lay_columns<Engine>(laid.key_panel(head, block), half, key, 1, p.key.token, here, p.depth);
  }
  const int64_t here = std::min<int64_t>(kSide, p.keys - first);
  for (int64_t d = 0; d < laid.value_blocks * kSide; d += kHalf)
    lay_columns<Engine>(laid.value_panel(head, d / kSide, block), d % kSide / kHalf, p.value.row(b, h, first) + d,
                        p.value.token, 1, std::max<int64_t>(0, p.value_depth - d), here);
}

// Turns one row's scores of `count` keys into weights in A. The row may see the keys from `begin` to before `end`.
template <class Engine>
void weigh(typename Engine::Unit* weights, int row, float* scores, int64_t begin, int64_t end, int64_t count, float* most,
           float* total, float* shrink) {
  const int64_t low = begin / kWidth * kWidth, high = (end + kWidth - 1) / kWidth * kWidth;
  *shrink = 1;
  if (begin >= end) {
    for (int64_t k = 0; k < count; k += kWidth) Engine::put(weights, row, k, Floats{});
    return;
  }
  std::fill(scores + low, scores + begin, kNone);
  std::fill(scores + end, scores + high, kNone);
  Floats top = spread(*most);
  for (int64_t k = low; k < high; k += kWidth) top = larger(top, load<Floats>(scores + k));
  const float now = largest(top);
  *shrink = std::exp2(*most - now);
  *most = now;
  Floats sums = {};
  for (int64_t k = 0; k < low; k += kWidth) Engine::put(weights, row, k, Floats{});
  for (int64_t k = low; k < high; k += kWidth) {
    const Floats weight = exp2_negative(load<Floats>(scores + k) - now);
    sums += weight;
    Engine::put(weights, row, k, weight);
  }
  for (int64_t k = high; k < count; k += kWidth) Engine::put(weights, row, k, Floats{});
  *total = *total * *shrink + sum(sums);
}

template <class Engine>
void attend(const Queries& p, const Laid<Engine>& laid, int64_t b, int64_t h, int64_t block, float* y) {
  using Unit = typename Engine::Unit;
  static thread_local Scratch<Unit> units;
  static thread_local Scratch<float> numbers;
  const int64_t first = block * kSide, wide = p.wide();
  const int rows = static_cast<int>(std::min<int64_t>(kSide, p.count - first)), whole = rows > kHalf ? kSide : kHalf;
  Unit* query = units.room((laid.depth_chunks + kTogether / kSide) * Engine::kPanelUnits);
  Unit* weights = query + laid.depth_chunks * Engine::kPanelUnits;
  float* scores = numbers.room(kSide * (kTogether + wide));
  float* out = scores + kSide * kTogether;
  alignas(64) static constexpr float kZeros[kSide] = {};
  float most[kSide], total[kSide] = {}, shrink[kSide];
  std::fill(most, most + kSide, kNone);

  lay_rows<Engine>(query, p.query.row(b, h, first), p.query.token, rows, p.depth, p.scale * kLog2OfE);
  int64_t low = p.keys, high = 0;
  for (int r = 0; r < rows; ++r)
    if (p.begin(b, first + r) < p.end(b, first + r)) {
      low = std::min(low, p.begin(b, first + r));
      high = std::max(high, p.end(b, first + r));
    }
  const int64_t head = b * p.key_heads + h / (p.heads / p.key_heads);
  bool begun = false;
  for (int64_t from = low / kSide * kSide; from < high; from += kTogether) {
    const int64_t chunks = blocks_of(std::min(kTogether, high - from)), count = chunks * kSide;
    for (int64_t j = 0; j < chunks; ++j)
      Engine::multiply(query, laid.key_panel(head, from / kSide + j), laid.depth_chunks, whole, kZeros, 0,
                       scores + j * kSide, kTogether);
    for (int r = 0; r < whole; ++r) {
      const int64_t begin = r < rows ? std::clamp<int64_t>(p.begin(b, first + r) - from, 0, count) : 0;
      const int64_t end = r < rows ? std::clamp<int64_t>(p.end(b, first + r) - from, 0, count) : 0;
      weigh<Engine>(weights, r, scores + r * kTogether, begin, end, count, most + r, total + r, shrink + r);
      if (begun && shrink[r] != 1)
        for (int64_t d = 0; d < wide; d += kWidth)
          store(out + r * wide + d, load<Floats>(out + r * wide + d) * shrink[r]);
    }
    for (int64_t d = 0; d < laid.value_blocks; ++d) {
      float* target = out + d * kSide;
      Engine::multiply(weights, laid.value_panel(head, d, from / kSide), chunks, whole, begun ? target : kZeros,
                       begun ? wide : 0, target, wide);
    }
    begun = true;
  }
  for (int r = 0; r < rows; ++r) {
    float* target = y + ((b * p.count + first + r) * p.heads + h) * p.value_depth;
    const float share = total[r] > 0 ? 1 / total[r] : 0;  // no admitted key gives zeros, as in torch's fused attention
    for (int64_t d = 0; d < p.value_depth; ++d) target[d] = share ? out[r * wide + d] * share : 0.0f;
  }
}

template <class Engine>
void attend_all(const Queries& p, float* y) {
  static thread_local Scratch<typename Engine::Unit> keys, values;
  Laid<Engine> laid{nullptr, nullptr, blocks_of(p.keys), blocks_of(p.depth), blocks_of(p.value_depth)};
  const int64_t heads = p.batch * p.key_heads;
  laid.keys = keys.room(heads * laid.key_units());
  laid.values = values.room(heads * laid.value_units());
  on_threads(0, heads * laid.key_blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) lay<Engine>(p, laid, i / laid.key_blocks, i % laid.key_blocks);
  });
  const int64_t blocks = p.blocks();
  on_threads(0, p.batch * p.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    const Session session(Engine::kBf16);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks, n = i % blocks;
      // later queries see more keys, so short and long blocks alternate to give threads equal work
      attend<Engine>(p, laid, head / p.heads, head % p.heads, n % 2 ? blocks - 1 - n / 2 : n / 2, y);
    }
  });
}

Tensor empty_ints(const std::vector<int64_t>& sizes) {
  const int64_t strides[] = {sizes[1] * sizes[2], sizes[2], 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(3, sizes.data(), strides, aoti_torch_dtype_int32(),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor rows_of(const Tensor& given) {
  const Tensor& t = present(given);
  const Tensor floats = t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
  return floats.stride(3) == 1 ? floats : torch::stable::contiguous(floats);
}

Rows rows(const Tensor& t) { return {floats(t), t.stride(0), t.stride(1), t.stride(2)}; }

}  // namespace

Tensor attend_many(const Tensor& q, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& spans,
                   double scale, int64_t parts) {
  STD_TORCH_CHECK(q.dim() == 4 && keys.dim() == 4 && values.dim() == 4 && keys.size(0) == q.size(0) &&
                      values.size(0) == q.size(0) && keys.size(1) == values.size(1) && keys.size(1) > 0 &&
                      q.size(1) % keys.size(1) == 0 && keys.size(2) == values.size(2) && keys.size(3) == q.size(3) &&
                      q.size(3) > 0 && values.size(3) > 0,
                  "q must be [B, H, Q, D], keys and values [B, Hk, T, D] with Hk a divisor of H");
  STD_TORCH_CHECK(parts >= 0 && parts <= 2, "parts is 0, 1 or 2, not ", parts);
  const Tensor query = rows_of(q), key = rows_of(keys), value = rows_of(values);
  Queries p{rows(query),  rows(key),    rows(value),     q.size(0), q.size(1), keys.size(1),
            q.size(2),    keys.size(2), q.size(3),       values.size(3), nullptr, 0,
            static_cast<float>(scale)};
  if (spans) {
    STD_TORCH_CHECK(spans->dim() == 3 && (spans->size(0) == 1 || spans->size(0) == p.batch) && spans->size(1) == p.count &&
                        spans->size(2) == 2 && spans->is_contiguous() && spans->scalar_type() == ScalarType::Int,
                    "spans must be INT32 [B or 1, Q, 2]");
    p.spans = static_cast<const int32_t*>(present(*spans).data_ptr());
    p.spans_batch = spans->size(0) == 1 ? 0 : 2 * p.count;
    for (int64_t i = 0; i < spans->size(0) * p.count; ++i)
      STD_TORCH_CHECK(p.spans[2 * i] >= 0 && p.spans[2 * i + 1] <= p.keys, "a span goes beyond the ", p.keys, " keys");
  } else {
    STD_TORCH_CHECK(p.count == p.keys, "without spans there must be as many queries as keys, not ", p.count, " and ", p.keys);
  }
  const Tensor y = empty_floats({p.batch, p.count, p.heads, p.value_depth});
  if (!y.numel()) return as_dtype_of(y, q);
#if defined(AUTOTUNE_BF16)
  if (parts) (parts == 1 ? attend_all<Bf16Parts<1>> : attend_all<Bf16Parts<2>>)(p, floats(y));
#else
  STD_TORCH_CHECK(!parts, "this processor has no instructions for products in BF16");
#endif
  if (!parts) attend_all<Singles>(p, floats(y));
  return as_dtype_of(y, q);
}

namespace {

// The span [first, last + 1) that each row of a boolean mask [B, 1, Q, T] admits, as INT32 [B, Q, 2]. If any row has a
// gap, the result is empty, [0, Q, 2].
Tensor mask_spans(const Tensor& mask) {
  STD_TORCH_CHECK(mask.dim() == 4 && mask.size(1) == 1 && mask.scalar_type() == ScalarType::Bool &&
                      (mask.stride(3) == 1 || mask.size(3) == 1),
                  "the mask must be boolean [B, 1, Q, T], contiguous in its keys");
  const int64_t batch = mask.size(0), count = mask.size(2), keys = mask.size(3);
  const Tensor found = empty_ints({batch, count, 2});
  int32_t* out = static_cast<int32_t*>(found.data_ptr());
  const uint8_t* at = static_cast<const uint8_t*>(present(mask).data_ptr());
  std::vector<uint8_t> broken(batch * count);  // a byte per row, because threads write neighbours
  on_threads(0, batch * count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* row = at + i / count * mask.stride(0) + i % count * mask.stride(2);
      int64_t first = 0, last = keys, admitted = 0;
      while (first < keys && !row[first]) ++first;
      while (last > first && !row[last - 1]) --last;
      for (int64_t k = first; k < last; ++k) admitted += row[k] != 0;
      broken[i] = admitted != last - first;
      out[2 * i] = static_cast<int32_t>(first);
      out[2 * i + 1] = static_cast<int32_t>(last);
    }
  });
  return std::find(broken.begin(), broken.end(), 1) == broken.end() ? found : empty_ints({0, count, 2});
}

}  // namespace
}  // namespace autotune

STABLE_TORCH_LIBRARY_FRAGMENT(autotune, library) {
  library.def("attend_many(Tensor q, Tensor keys, Tensor values, Tensor? spans, float scale, int parts) -> Tensor");
  library.def("mask_spans(Tensor mask) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(autotune, CPU, library) {
  library.impl("attend_many", TORCH_BOX(&autotune::attend_many));
  library.impl("mask_spans", TORCH_BOX(&autotune::mask_spans));
}
