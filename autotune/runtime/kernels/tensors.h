// The parts of torch that the operators need, through its stable C interface, which compiles in a second and works
// across torch versions.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "vectors.h"

namespace autotune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty_floats(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int i = static_cast<int>(sizes.size()) - 2; i >= 0; --i)
    strides[i] = strides[i + 1] * (sizes[i + 1] > 0 ? sizes[i + 1] : 1);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                         aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

inline Tensor view(const Tensor& t, const std::vector<int64_t>& sizes, int64_t row_stride, int64_t offset) {
  const int64_t strides[] = {row_stride, 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), sizes.size(), sizes.data(), strides, offset, &handle));
  return Tensor(handle);
}

// Part `index` of the first dimension.
inline Tensor part_of(const Tensor& t, int64_t index) {
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 1; d < t.dim(); ++d) sizes.push_back(t.size(d)), strides.push_back(t.stride(d));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), sizes.size(), sizes.data(), strides.data(),
                                                               index * t.stride(0), &handle));
  return Tensor(handle);
}

// Checks that all elements of a tensor are in the CPU's memory, and returns it: a storage may be freed or too short.
inline const Tensor& present(const Tensor& t) {
  int32_t where;
  int64_t bytes, first;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &where));
  STD_TORCH_CHECK(where == aoti_torch_device_type_cpu(), "expected a tensor on the CPU");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &first));
  int64_t end = first + 1;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return t;
    end += (t.size(d) - 1) * t.stride(d);
  }
  STD_TORCH_CHECK(end * static_cast<int64_t>(t.element_size()) <= bytes, "a tensor goes beyond its memory: it needs ",
                  end * static_cast<int64_t>(t.element_size()), " bytes and has ", bytes);
  return t;
}

inline Tensor contiguous_floats(const Tensor& given) {
  const Tensor& t = present(given);
  const Tensor floats = t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
  return floats.is_contiguous() ? floats : torch::stable::contiguous(floats);
}

inline Tensor as_dtype_of(const Tensor& t, const Tensor& other) {
  return other.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, other.scalar_type());
}

inline void multiply_into(const Tensor& a, const Tensor& b, const Tensor& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// Numbers of any floating type, which are read as FP32.
struct Numbers {
  const uint8_t* at = nullptr;
  ScalarType type = ScalarType::Float;

  explicit operator bool() const { return at; }

  Floats load(int64_t i) const {
    switch (type) {
      case ScalarType::Half: return widen(reinterpret_cast<const Half*>(at) + i);
      case ScalarType::BFloat16: return widen(reinterpret_cast<const Bf16*>(at) + i);
      default: return widen(reinterpret_cast<const float*>(at) + i);
    }
  }

  static Numbers of(const Tensor& t) {
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                    "expected numbers in FP32, FP16 or BF16");
    return {static_cast<const uint8_t*>(present(t).data_ptr()), type};
  }
};

}  // namespace autotune
