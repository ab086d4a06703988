// A pool of sleeping worker threads for the CPU kernels.
#pragma once

#include <cstdint>
#include <functional>

namespace paci_rt {

// Calls body(i) for every i in [0, tasks), on up to `threads` threads, the caller being one of them. Returns when all
// are done. Tasks must not throw. Safe to call from several threads and after fork().
void parallel_for(std::int64_t tasks, int threads, const std::function<void(std::int64_t)>& body);

}  // namespace paci_rt
