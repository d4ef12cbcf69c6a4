// Rows of a packed table, for an embedding that shares the weights of lm_head. The layout is described in linear.h.
#include "embedding.h"

#include <optional>
#include <vector>

namespace autotune {
namespace {

LookUp look_up_of(ScalarType type) {
  switch (type) {
    case ScalarType::Half: return look_up<Plain<Half>>;
    case ScalarType::BFloat16: return look_up<Plain<Bf16>>;
    case ScalarType::Float: return look_up<Plain<float>>;
    case ScalarType::Char: return look_up<Plain<int8_t>>;
    case ScalarType::Short: return look_up<Int6>;
    case ScalarType::Int: return look_up<Int4>;
    default: STD_TORCH_CHECK(false, "packed_rows takes tables in FP16, BF16, FP32, INT8, INT6 in INT16 or INT4 in INT32");
  }
}

Numbers per_group(const Table& table, const Tensor& factors, int64_t blocks) {
  STD_TORCH_CHECK(factors.is_contiguous() && factors.dim() == 3 && factors.size(0) == blocks &&
                      factors.size(1) == table.groups && factors.size(2) == kRows,
                  "scales and zeros must be contiguous [", blocks, ", ", table.groups, ", 16]");
  return Numbers::of(factors);
}

Tensor packed_rows(const Tensor& ids, const Tensor& packed, const std::optional<Tensor>& scales,
                   const std::optional<Tensor>& zeros, int64_t rows, int64_t width) {
  STD_TORCH_CHECK(rows > 0 && width > 0, "expected a table with rows and columns, not [", rows, ", ", width, "]");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int,
                  "token ids must be INT64 or INT32");
  present(ids);
  const LookUp use = look_up_of(packed.scalar_type());
  const int64_t blocks = (rows + kRows - 1) / kRows;
  STD_TORCH_CHECK(packed.is_contiguous() && packed.dim() == 3 && packed.size(0) == blocks && packed.size(2) == kRows,
                  "a packed table of ", rows, " rows must be contiguous [", blocks, ", K, 16]");
  Table table{};
  table.numbers = static_cast<const uint8_t*>(present(packed).data_ptr());
  table.inputs = inputs_of(packed);
  table.block_bytes = packed.size(1) * kRows * packed.element_size();
  table.width = width;
  table.groups = scales && scales->dim() == 3 ? scales->size(1) : 1;
  STD_TORCH_CHECK(width <= table.inputs, "the table has ", table.inputs, " columns, fewer than the ", width, " asked for");
  STD_TORCH_CHECK(table.groups > 0 && table.inputs % (table.groups * kStep) == 0,
                  "groups must divide the table's columns into multiples of 8");
  if (scales) table.scales = per_group(table, *scales, blocks);
  if (zeros) table.zeros = per_group(table, *zeros, blocks);

  const auto sizes = ids.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.push_back(width);
  const Tensor wanted = torch::stable::contiguous(torch::stable::to(ids, ScalarType::Long)), out = empty_floats(shape);
  const int64_t* row = static_cast<const int64_t*>(wanted.data_ptr());
  const int64_t count = wanted.numel();
  for (int64_t i = 0; i < count; ++i)  // checked before any row is read, because other threads must not throw
    STD_TORCH_CHECK(row[i] >= 0 && row[i] < rows, "index ", row[i], " is out of range for a table of ", rows, " rows");
  torch::stable::parallel_for(0, count, 8, [&, target = floats(out)](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) use(table, row[i], target + i * width);
  });
  return out;
}

}  // namespace
}  // namespace autotune

STABLE_TORCH_LIBRARY_FRAGMENT(autotune, library) {
  library.def(
      "packed_rows(Tensor ids, Tensor packed, Tensor? scales, Tensor? zeros, int rows, int width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(autotune, CPU, library) { library.impl("packed_rows", TORCH_BOX(&autotune::packed_rows)); }
