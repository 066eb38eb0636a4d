// Work shared among threads that live for one call: nothing is left behind that a fork could break.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace tricomp {

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
