// Attention of many new tokens, for other operators.
#pragma once

#include "tensors.h"

namespace autotune {

// q [B, H, Q, D], keys and values [B, Hk, T, D], spans INT32 [B or 1, Q, 2] or none -> [B, Q, H, D].
Tensor attend_many(const Tensor& q, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& spans,
                   double scale, int64_t parts);

}  // namespace autotune
