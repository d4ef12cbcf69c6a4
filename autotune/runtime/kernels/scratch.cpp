// Frees what the operators for prompts keep from call to call.
#include "scratch.h"

#include <atomic>

#include "tensors.h"

namespace autotune {
namespace {

// Frees the blocks of the calling thread and of those that compute with it. Returns their bytes.
int64_t free_kept() {
  std::atomic<int64_t> freed = 0;
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) { freed += Kept::free_all(); });
  return freed;
}

}  // namespace
}  // namespace autotune

STABLE_TORCH_LIBRARY_FRAGMENT(autotune, library) { library.def("free_kept() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(autotune, CompositeExplicitAutograd, library) {
  library.impl("free_kept", TORCH_BOX(&autotune::free_kept));
}
