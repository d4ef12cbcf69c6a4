// The addresses of all layers' weights, looked up once for many prompts.
#include "layer.h"

namespace autotune {
namespace {

// Reads the weights of layers, one after the other. Of each layer, `held` has the norms' weights (before, after, and of
// queries and keys if it has them), then of q, k, v, o, gate, up and down the weight's parts and the bias, if there is
// one. `form`, INT64 [L, 15], says how many there are: 1 or 0 for the norms of heads, then parts and biases in turn.
// `eps`, FP32 [L, 3], are those of the norms.
class LayerReader {
 public:
  static constexpr int64_t kForm = 15, kNorms = 3;

  LayerReader(const Parts& held, const Tensor& form, const Tensor& eps, const Sizes& sizes, int64_t hidden)
      : held_(held), sizes_(sizes), hidden_(hidden), form_(static_cast<const int64_t*>(present(form).data_ptr())),
        eps_(floats(present(eps))) {}

  LayerWeights next() {
    const bool of_heads = form_[0];
    const Tensor before = in_place(take()), after = in_place(take());
    const Maybe of_q = maybe(of_heads), of_k = maybe(of_heads);
    ++form_;
    const auto [layers, width, depth, outputs, key_outputs] = sizes_;
    const LayerWeights found{norm(before, eps_[0], width),  norm(of_q, eps_[1], depth),   norm(of_k, eps_[1], depth),
                             norm(after, eps_[2], width),   linear(outputs, width),       linear(key_outputs, width),
                             linear(key_outputs, width),    linear(width, outputs),       linear(hidden_, width),
                             linear(hidden_, width),        linear(width, hidden_)};
    eps_ += kNorms;
    return found;
  }
  bool is_done() const { return at_ == held_.size(); }

 private:
  // A table has no room for copies.
  static const Tensor& in_place(const Tensor& t) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), "norms and biases must be FP32, contiguous");
    return t;
  }
  Tensor take() {
    STD_TORCH_CHECK(at_ < held_.size(), "the layers have fewer tensors than their form says");
    return held_[at_++];
  }
  Maybe maybe(bool there) { return there ? Maybe(in_place(take())) : std::nullopt; }
  Norm norm(const Maybe& weight, float eps, int64_t width) {
    return Given().norm(weight, eps, width);
  }
  Linear linear(int64_t outputs, int64_t inputs) {
    Parts weight;
    for (int64_t i = 0; i < form_[0]; ++i) weight.push_back(take());
    const Maybe bias = maybe(form_[1]);
    form_ += 2;
    return Given().linear(weight, bias, outputs, inputs);
  }

  const Parts& held_;
  const Sizes sizes_;
  const int64_t hidden_;
  const int64_t* form_;
  const float* eps_;
  size_t at_ = 0;
};

// A table is for this process alone, and as long as the tensors stay where they are.
Tensor layer_table(const Parts& held, const Tensor& form, const Tensor& eps, int64_t width, int64_t depth, int64_t outputs,
                   int64_t key_outputs, int64_t hidden) {
  STD_TORCH_CHECK(form.dim() == 2 && form.size(1) == LayerReader::kForm && form.scalar_type() == ScalarType::Long &&
                      form.is_contiguous() && eps.dim() == 2 && eps.size(0) == form.size(0) &&
                      eps.size(1) == LayerReader::kNorms && eps.scalar_type() == ScalarType::Float && eps.is_contiguous(),
                  "form must be INT64 [L, 15], eps FP32 [L, 3]");
  const Sizes sizes{form.size(0), width, depth, outputs, key_outputs};
  LayerReader reader(held, form, eps, sizes, hidden);
  const int64_t bytes[] = {static_cast<int64_t>(sizeof(Sizes) + sizes.layers * sizeof(LayerWeights))}, stride[] = {1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, bytes, stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor table(handle);
  uint8_t* at = static_cast<uint8_t*>(table.data_ptr());
  std::memcpy(at, &sizes, sizeof(Sizes));
  at += sizeof(Sizes);
  for (int64_t n = 0; n < sizes.layers; ++n, at += sizeof(LayerWeights)) {
    const LayerWeights found = reader.next();
    std::memcpy(at, &found, sizeof(LayerWeights));
  }
  STD_TORCH_CHECK(reader.is_done(), "the layers have more tensors than their form says");
  return table;
}

}  // namespace
}  // namespace autotune

STABLE_TORCH_LIBRARY_FRAGMENT(autotune, library) {
  library.def(
      "layer_table(Tensor[] held, Tensor form, Tensor eps, int width, int depth, int out_features, int key_features, "
      "int hidden) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(autotune, CPU, library) { library.impl("layer_table", TORCH_BOX(&autotune::layer_table)); }
