// What our kernels call of OpenMP's runtime, by std::thread. ThreadSanitizer knows when those start and end; of
// libgomp, which is not compiled with it, it knows nothing. tools/sanitize.py links it into mnist_ext._C; PyTorch keeps
// libgomp.
//
// Each parallel region has threads of its own, and within a region there is none.
#include <thread>
#include <vector>

namespace {

thread_local int number = 0, count = 1;

}  // namespace

extern "C" {

// `#pragma omp parallel num_threads(threads)`, as GCC compiles it. The caller is thread 0.
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned /*flags*/) {
  const auto run = [&](int its_number) {
    number = its_number;
    count = static_cast<int>(threads);
    body(data);
    number = 0;
    count = 1;
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(run, static_cast<int>(i));
  run(0);
  for (std::thread& other : others) other.join();
}

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return count; }
int omp_get_num_procs() { return static_cast<int>(std::thread::hardware_concurrency()); }
}
