// Loops on several threads.
#pragma once

#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace swiftkernels {

#if !defined(_WIN32)
inline bool forked = false;
inline const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#else
constexpr bool forked = false;
#endif

/// Threads to use: one in a child process, because OpenMP's pool does not survive a fork.
inline int usable_threads(int64_t wanted) { return forked ? 1 : static_cast<int>(wanted); }

/// Call work(thread) on up to `threads` threads at once.
template <class Work>
inline void parallel_region(int threads, Work work) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num());
    return;
  }
#endif
  work(0);
}

/// Call work(i, thread) for i in [0, count); each thread takes a contiguous share.
template <class Work>
inline void parallel_for(int64_t count, int threads, Work work) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
      for (int64_t i = count * thread / all; i < count * (thread + 1) / all; i++)
        work(i, static_cast<int>(thread));
    }
    return;
  }
#endif
  for (int64_t i = 0; i < count; i++) work(i, 0);
}

}  // namespace swiftkernels
