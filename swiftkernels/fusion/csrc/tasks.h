// Tasks that threads take in order, and that wait for some of the tasks before them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

namespace swiftkernels::fusion {

/// Every task waits for earlier ones only. Threads take tasks in order, so those that are waited
/// for are running or done. A thread that waits looks a few times, for as long as a small task
/// takes, and then sleeps: where other programs need the processor, it has to be free for the other
/// threads.
class Tasks {
 public:
  explicit Tasks(int64_t count)
      : count_(count), done_(new std::atomic<bool>[count > 0 ? count : 1]()) {}

  /// The next task; -1 if all are taken.
  int64_t take() {
    const int64_t task = next_.fetch_add(1);
    return task < count_ ? task : -1;
  }

  void finish(int64_t task) {
    done_[task].store(true);
    if (sleeping_.load() == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }

  /// Wait for the tasks [first, end).
  void wait(int64_t first, int64_t end) {
    for (; first < end; first++)
      if (!done_[first].load()) wait(first);
  }
  void wait_for_all() { wait(0, count_); }

 private:
  static constexpr int LOOKS = 2000;  // up to 0.1 ms

  void wait(int64_t task) {
    for (int i = 0; i < LOOKS; i++) {
      if (done_[task].load()) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_++;
    wake_.wait(lock, [&] { return done_[task].load(); });
    sleeping_--;
  }

  const int64_t count_;
  const std::unique_ptr<std::atomic<bool>[]> done_;
  std::atomic<int64_t> next_{0};
  std::atomic<int> sleeping_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace swiftkernels::fusion
