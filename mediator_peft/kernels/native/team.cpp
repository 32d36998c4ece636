#include "team.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace {

struct Work {
    Kernel kernel;
    const void* call;
    int64_t next = 0;
};

void take_part(void* argument) {
    Work& work = *static_cast<Work*>(argument);
    work.kernel(work.call, &work.next);
}

std::atomic<HostTeam> host_team{nullptr};

// Threads that wait for work. One call at a time; whoever finds the pool taken works alone, with the same result.
class Pool {
public:
    void run(Work& work, int num_helpers) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (turn.owns_lock()) {
            std::lock_guard<std::mutex> guard(mutex_);
            for (; num_threads_ < num_helpers; ++num_threads_) std::thread([this] { wait_for_work(); }).detach();
            work_ = &work;
            wanted_ = num_helpers;
            start_.notify_all();
        }
        take_part(&work);
        if (turn.owns_lock()) {
            std::unique_lock<std::mutex> guard(mutex_);
            wanted_ = 0;  // whoever has not started finds nothing left to do
            done_.wait(guard, [this] { return busy_ == 0; });
            work_ = nullptr;
        }
    }

private:
    void wait_for_work() {
        std::unique_lock<std::mutex> guard(mutex_);
        for (;;) {
            start_.wait(guard, [this] { return wanted_ > 0; });
            --wanted_;
            ++busy_;
            Work* work = work_;
            guard.unlock();
            take_part(work);
            guard.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable start_, done_;
    Work* work_ = nullptr;
    int wanted_ = 0, busy_ = 0, num_threads_ = 0;
};

// Never destroyed, as its threads may outlive static objects. A forked child has none of them, nor those of OpenMP: it
// starts with a pool of its own.
Pool* pool = new Pool;

void after_fork() {
    pool = new Pool;
    host_team = nullptr;
}

#if defined(__unix__) || defined(__APPLE__)
const int registered = pthread_atfork(nullptr, nullptr, after_fork);
#endif

}  // namespace

void run_in_threads(Kernel kernel, const void* call, int num_threads) {
    Work work{kernel, call};
    if (num_threads <= 1) {
        take_part(&work);
    } else if (HostTeam team = host_team.load(std::memory_order_relaxed)) {
        team(take_part, &work, unsigned(num_threads), 0);
    } else {
        pool->run(work, num_threads - 1);
    }
}

void set_host_team(HostTeam team) { host_team = team; }
