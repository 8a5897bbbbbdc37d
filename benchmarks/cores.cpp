// How long a cache line takes from one core to another: two threads on the first two CPUs that this process may use
// hand a number back and forth. Prints nanoseconds one way. Built and run by cores.py.
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

constexpr int kRounds = 20'000, kTurns = 5;

void run_on(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

void wait_for(const std::atomic<int>& number, int value) {
  while (number.load(std::memory_order_acquire) != value) {
  }
}

double nanoseconds_one_way(int first_cpu, int second_cpu) {
  alignas(64) std::atomic<int> number = 0;
  std::thread second([&] {
    run_on(second_cpu);
    for (int i = 0; i < kRounds; ++i) {
      wait_for(number, 2 * i + 1);
      number.store(2 * i + 2, std::memory_order_release);
    }
  });
  run_on(first_cpu);
  number.store(1, std::memory_order_release);
  wait_for(number, 2);  // both have started
  const auto started = std::chrono::steady_clock::now();
  for (int i = 1; i < kRounds; ++i) {
    number.store(2 * i + 1, std::memory_order_release);
    wait_for(number, 2 * i + 2);
  }
  const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - started;
  second.join();
  return time.count() / (2 * (kRounds - 1));
}

}  // namespace

int main() {
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof(allowed), &allowed);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
  }
  if (cpus.size() < 2) return 1;
  double best = nanoseconds_one_way(cpus[0], cpus[1]);
  for (int turn = 1; turn < kTurns; ++turn) best = std::min(best, nanoseconds_one_way(cpus[0], cpus[1]));
  std::printf("%.1f\n", best);
}
