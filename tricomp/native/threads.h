// Work shared among threads that live for one call: nothing is left behind that a fork could break.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace tricomp {

// Scratch memory of one thread, uninitialised. It is kept for the next call, since fresh memory costs as much as the work
// of a small leaf: never more of it than threads that were at work at one time. A Lent may be copied; the last one gives
// back. A lock that a fork left locked only means that memory is not kept.
template <class T>
class Lent {
  public:
    Lent() {
        std::unique_lock<std::mutex> held(lock(), std::try_to_lock);
        std::unique_ptr<T> memory;
        if (held && !kept().empty()) {
            memory = std::move(kept().back());
            kept().pop_back();
        }
        if (held) held.unlock();
        if (!memory) memory.reset(new T);
        memory_ = std::shared_ptr<T>(memory.release(), give_back);
    }

    T& operator*() const { return *memory_; }
    T* operator->() const { return memory_.get(); }

  private:
    static std::mutex& lock() {
        static std::mutex only;
        return only;
    }
    static std::vector<std::unique_ptr<T>>& kept() {
        static auto* all = new std::vector<std::unique_ptr<T>>;  // outlives threads that end late
        return *all;
    }
    static void give_back(T* memory) {
        std::unique_ptr<T> owned(memory);
        try {
            std::unique_lock<std::mutex> held(lock(), std::try_to_lock);
            if (held) kept().push_back(std::move(owned));
        } catch (const std::bad_alloc&) {
            // Then it is not kept.
        }
    }

    std::shared_ptr<T> memory_;
};

// Call work(item) for the items 0 .. n - 1, each once, taken in ascending order by up to n_threads threads, of which the
// caller's is one. make_work() is called in each thread and gives it its own work, with scratch memory that it holds.
// The first exception is rethrown after all threads have ended.
template <class MakeWork>
void share(size_t n, size_t n_threads, MakeWork make_work) {
    std::atomic<size_t> next{0};
    std::exception_ptr failure;
    std::mutex lock;
    auto run = [&]() {
        try {
            auto work = make_work();
            for (size_t item = next++; item < n; item = next++) work(item);
        } catch (...) {
            next = n;
            std::lock_guard<std::mutex> held(lock);
            if (!failure) failure = std::current_exception();
        }
    };
    std::vector<std::thread> threads;
    n_threads = std::min(n_threads, n);
    try {
        while (threads.size() + 1 < n_threads) threads.emplace_back(run);
    } catch (const std::system_error&) {
        // As many as the system gives.
    }
    run();
    for (std::thread& thread : threads) thread.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace tricomp
