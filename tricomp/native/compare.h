// Exact comparisons of whole arrays: equal, how many words differ. They stop as soon as they can.
//
// Mirrors count_unequal and is_equal of reference/bits.py. Imports no STL. The hard thing: compilers turn
// only loops without an early end into vectors, so each looks at a block, then asks whether to go on.
#pragma once

#include <cstring>

#include "model.h"
#include "isa.h"

TRICOMP_BEGIN

constexpr size_t COMPARE_BLOCK = 4096;  // bytes

// Whether n_bytes bytes are the same.
inline bool is_equal(const uint8_t* bytes, const uint8_t* others, size_t n_bytes) {
    if (bytes == others) return true;
    size_t at = 0;
    for (; n_bytes - at >= COMPARE_BLOCK; at += COMPARE_BLOCK) {
        uint64_t differences = 0;
        for (size_t i = 0; i < COMPARE_BLOCK; i += 8) {
            uint64_t word, other;
            memcpy(&word, bytes + at + i, 8);
            memcpy(&other, others + at + i, 8);
            differences |= word ^ other;
        }
        if (differences) return false;
    }
    return n_bytes == at || memcmp(bytes + at, others + at, n_bytes - at) == 0;
}

// How many of n words a test holds for; any number above `most` once there are more. A block's count fits a Word.
template <class Word, class Test>
INLINE size_t count_where(size_t n, size_t most, const Test& test) {
    constexpr size_t BLOCK = sizeof(Word) == 1 ? 192 : COMPARE_BLOCK;
    size_t n_found = 0;
    for (size_t first = 0; first < n && n_found <= most; first += BLOCK) {
        const size_t last = n - first < BLOCK ? n : first + BLOCK;
        Word n_here = 0;
        for (size_t i = first; i < last; i++) n_here = static_cast<Word>(n_here + test(i));
        n_found += static_cast<size_t>(n_here);
    }
    return n_found;
}

// How many words differ from the others.
template <class Word>
inline size_t count_unequal(const Word* words, const Word* others, size_t n, size_t most = SIZE_MAX) {
    return count_where<Word>(n, most, [=](size_t i) { return static_cast<Word>(words[i] != others[i]); });
}

// How many words differ from one word.
template <class Word>
inline size_t count_unequal_to(const Word* words, Word other, size_t n, size_t most = SIZE_MAX) {
    return count_where<Word>(n, most, [=](size_t i) { return static_cast<Word>(words[i] != other); });
}

TRICOMP_END
