#include "cpu/kernels.hpp"

#include <atomic>
#include <cmath>
#include <memory>

#include "core/check.hpp"
#include "cpu/thread_pool.hpp"

namespace paci_rt {

extern const KernelTable kernels_baseline;
#if defined(PACI_RT_X86)
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
#endif

namespace {

std::vector<const KernelTable*> usable_tables() {
  std::vector<const KernelTable*> tables{&kernels_baseline};
#if defined(PACI_RT_X86)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
    tables.push_back(&kernels_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      tables.push_back(&kernels_avx512);
  }
#endif
  return tables;
}

std::atomic<const KernelTable*>& selected() {
  static std::atomic<const KernelTable*> table{usable_tables().back()};
  return table;
}

}  // namespace

const KernelTable& kernels() { return *selected().load(std::memory_order_relaxed); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : usable_tables()) names.emplace_back(table->name);
  return names;
}

void select_isa(const std::string& name) {
  const auto tables = usable_tables();
  if (name == "auto") return selected().store(tables.back());
  std::string known = "auto";
  for (const KernelTable* table : tables) {
    if (name == table->name) return selected().store(table);
    known += concat(", ", table->name);
  }
  check_value(false, "instruction set \"", name, "\" is not usable on this CPU: choose one of ", known);
}

namespace {

// `one(chunk begin, count)` returns a chunk's sum of squares after its work; counts are taken where they are needed.
template <typename One>
SumAndCount in_chunks(const float* x, std::int64_t n, int threads, const One& one) {
  const KernelTable& table = kernels();
  const std::int64_t chunks = (n + kChunk - 1) / kChunk;
  const auto part_of = [&](std::int64_t chunk) {
    const std::int64_t at = chunk * kChunk, count = n - at < kChunk ? n - at : kChunk;
    SumAndCount part;
    part.sum_of_squares = one(at, count);
    // The squares of finite floats never overflow a sum in double: only a non-finite sum needs a count.
    if (!std::isfinite(part.sum_of_squares)) part.nonfinite = table.count_nonfinite(x + at, count);
    return part;
  };
  SumAndCount total;
  const auto take = [&](const SumAndCount& part) {
    total.sum_of_squares += part.sum_of_squares;
    total.nonfinite += part.nonfinite;
  };
  if (threads <= 1 || chunks <= 1) {
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) take(part_of(chunk));
    return total;
  }
  const auto parts = std::make_unique<SumAndCount[]>(static_cast<std::size_t>(chunks));
  parallel_for(chunks, threads, [&](std::int64_t chunk) { parts[chunk] = part_of(chunk); });
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) take(parts[chunk]);
  return total;
}

}  // namespace

SumAndCount accumulate_segment(float* dst, const void* src, DType dtype, std::int64_t n, bool overwrite, bool stream,
                               int threads) {
  const auto* bytes = static_cast<const unsigned char*>(src);
  const auto accumulate = kernels().accumulate;
  return in_chunks(dst, n, threads, [&](std::int64_t at, std::int64_t count) {
    return accumulate(dst + at, bytes + at * size_of(dtype), dtype, count, overwrite, stream);
  });
}

SumAndCount measure_segment(const float* x, std::int64_t n, int threads) {
  const auto sum_of_squares = kernels().sum_of_squares;
  return in_chunks(x, n, threads, [&](std::int64_t at, std::int64_t count) { return sum_of_squares(x + at, count); });
}

}  // namespace paci_rt
