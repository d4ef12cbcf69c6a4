// Attention of one new token over a preallocated key-value cache, as an operator.
#include "attention.h"

#include <vector>

namespace autotune {
namespace {

constexpr int64_t kLeastTask = 16 << 10;  // numbers of cache per thread; with fewer, a further thread does not pay

Cache cache(const Tensor& t) {
  STD_TORCH_CHECK(t.stride(3) == 1, "keys and values must be contiguous in their last dimension");
  return {static_cast<const uint8_t*>(present(t).data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

Mask described(const Tensor& t, int64_t batch, int64_t heads, int64_t length) {
  STD_TORCH_CHECK(t.dim() == 4 && (t.size(0) == 1 || t.size(0) == batch) && (t.size(1) == 1 || t.size(1) == heads) &&
                      t.size(2) == 1 && t.size(3) >= length && (t.stride(3) == 1 || t.size(3) == 1),
                  "the mask must be [B or 1, H or 1, 1, slots], contiguous in its slots and no shorter than the length");
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Bool || type == ScalarType::Float, "the mask must be boolean or FP32");
  return {static_cast<const uint8_t*>(present(t).data_ptr()), type == ScalarType::Float,
          t.size(0) == 1 ? 0 : t.stride(0), t.size(1) == 1 ? 0 : t.stride(1)};
}

Tensor attend_one(const Tensor& q, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& length,
                  const std::optional<Tensor>& mask, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && q.size(2) == 1, "attend_one takes one query: q must be [B, H, 1, D]");
  const int64_t batch = q.size(0), heads = q.size(1), depth = q.size(3);
  STD_TORCH_CHECK(heads > 0 && depth > 0, "q must have heads, and numbers in each");
  STD_TORCH_CHECK(keys.dim() == 4 && values.dim() == 4 && keys.size(0) == batch && values.size(0) == batch &&
                      keys.size(1) == values.size(1) && keys.size(1) > 0 && heads % keys.size(1) == 0 &&
                      keys.size(2) == values.size(2) && keys.size(3) == depth && values.size(3) == depth,
                  "keys and values must be [B, Hk, slots, D] with Hk a divisor of H");
  STD_TORCH_CHECK(keys.scalar_type() == values.scalar_type(), "keys and values must have one dtype");
  STD_TORCH_CHECK(!length || (length->numel() == 1 && length->scalar_type() == ScalarType::Long),
                  "length must be one INT64");
  const Tensor query = contiguous_floats(q);
  Problem p{floats(query), cache(keys), cache(values), {}, heads, heads / keys.size(1), depth,
            length ? *static_cast<const int64_t*>(present(*length).data_ptr()) : keys.size(2), static_cast<float>(scale)};
  STD_TORCH_CHECK(p.length >= 0 && p.length <= keys.size(2), "length ", p.length, " exceeds ", keys.size(2), " slots");
  if (mask) {
    p.mask = described(*mask, batch, heads, p.length);
    p.length = reach(p.mask, batch, heads, p.length);
  }

  STD_TORCH_CHECK(Numbers::of(keys), "the cache is empty");
  const Tensor y = empty_floats({batch, 1, heads, depth});
  static thread_local std::vector<float> scratch;
  Attention attention{p, batch, keys.size(1), attend_over(keys.scalar_type()), nullptr};
  scratch.resize(attention.partial_floats());
  attention.partials = scratch.data();
  const int64_t grain = std::max<int64_t>(1, kLeastTask / (kSpan * depth));
  torch::stable::parallel_for(0, attention.tasks(), grain,
                              [&](int64_t begin, int64_t end) { attention.work(begin, end); });
  attention.merge(0, batch * heads, floats(y));
  return as_dtype_of(y, q);
}

}  // namespace
}  // namespace autotune

STABLE_TORCH_LIBRARY_FRAGMENT(autotune, library) {
  library.def(
      "attend_one(Tensor q, Tensor keys, Tensor values, Tensor? length, Tensor? mask, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(autotune, CPU, library) { library.impl("attend_one", TORCH_BOX(&autotune::attend_one)); }
