// From a Plan's numbers to a Model. The rules are those of tricomp/plan.py: whatever calls the module, no stage gets
// numbers that it is not made for.

#include "frame.h"

namespace tricomp {

bool model_of(const PlanNumbers& numbers, Model& model) {
    const int64_t* f = numbers.fields;
    auto is_in = [](int64_t value, int64_t low, int64_t high) { return low <= value && value <= high; };
    auto is_width = [](int64_t bits) { return bits == 8 || bits == 16 || bits == 32 || bits == 64; };
    const int64_t W = f[P_WORD_BITS], M = f[P_MANTISSA_BITS];
    const bool is_float = f[P_IS_FLOAT] != 0;
    if (!is_width(W) || !is_width(f[P_SOURCE_WORD_BITS])) return false;
    if (is_float && (!is_in(f[P_EXPONENT_BITS], 1, 11) || f[P_EXPONENT_BITS] + M + 1 != W)) return false;
    if (!is_float && (M || f[P_EXPONENT_BITS])) return false;
    const struct { PlanField field; int64_t low, high; } RANGES[] = {
        {P_PREDICT, RAW, CAST}, {P_ENTROPY, NO_ENTROPY, RANS}, {P_REMAINDER, NO_REMAINDER, STACK},
        {P_CHUNK_LOG2, 10, 16}, {P_N_WORDS, 0, int64_t(1) << 48}, {P_N_SYMBOLS, 0, 256}, {P_BASE, -65536, 65536},
        {P_PROB_BITS, 8, 11}, {P_N_CONTEXTS, 1, 8}, {P_CONTEXT_BASE, -4096, 4096}, {P_CONTEXT_SHIFT, 0, 12},
        {P_K, 0, 4}, {P_HAS_SIGN, 0, 1}, {P_N_COLUMNS, 0, int64_t(1) << 48}, {P_HAS_COLUMN_SCALE, 0, 1},
        {P_FACTOR, 1, 0xFFFFFFFF}, {P_INDEX_BITS, 0, 8}, {P_SHIFT, 0, 63}, {P_HAS_BLOCK_SHIFTS, 0, 1},
        {P_CODED_PLANES, 0, 255}, {P_SIDE_BYTES, 0, int64_t(1) << 48}, {P_HAS_REFERENCE, 0, 1},
    };
    for (const auto& range : RANGES)
        if (!is_in(f[range.field], range.low, range.high)) return false;

    model = Model();
    model.kind = {uint32_t(W), uint32_t(f[P_EXPONENT_BITS]), uint32_t(M), is_float, f[P_IS_SIGNED] != 0};
    model.source = {uint32_t(f[P_SOURCE_WORD_BITS]), uint32_t(f[P_SOURCE_EXPONENT_BITS]),
                    uint32_t(f[P_SOURCE_MANTISSA_BITS]), true, true};
    model.predict = Predict(f[P_PREDICT]);
    model.entropy = Entropy(f[P_ENTROPY]);
    model.remainder = Remainder(f[P_REMAINDER]);
    model.chunk_log2 = uint32_t(f[P_CHUNK_LOG2]);
    model.n_words = uint64_t(f[P_N_WORDS]);
    model.n_symbols = uint32_t(f[P_N_SYMBOLS]);
    model.base = int32_t(f[P_BASE]);
    model.prob_bits = uint32_t(f[P_PROB_BITS]);
    model.n_contexts = uint32_t(f[P_N_CONTEXTS]);
    model.context_base = int32_t(f[P_CONTEXT_BASE]);
    model.context_shift = uint32_t(f[P_CONTEXT_SHIFT]);
    model.k = uint32_t(f[P_K]);
    model.has_sign = f[P_HAS_SIGN] != 0;
    model.n_columns = uint64_t(f[P_N_COLUMNS]);
    model.has_column_scale = f[P_HAS_COLUMN_SCALE] != 0;
    model.factor = uint64_t(f[P_FACTOR]);
    model.index_bits = uint32_t(f[P_INDEX_BITS]);
    model.shift = uint32_t(f[P_SHIFT]);
    model.has_block_shifts = f[P_HAS_BLOCK_SHIFTS] != 0;
    model.coded_planes = uint32_t(f[P_CODED_PLANES]);
    model.word = uint64_t(f[P_WORD]);
    model.has_reference = f[P_HAS_REFERENCE] != 0;

    const bool is_delta = model.predict == DELTA || model.predict == SCALED_DELTA, is_full = model.predict == FULL;
    const bool is_symbolic = is_delta || is_full || model.predict == PALETTE;
    const bool needs_float = is_full || model.predict == SCALED_DELTA || model.predict == CAST;
    if (is_symbolic != (model.entropy != NO_ENTROPY) || is_symbolic != (model.n_symbols > 0)) return false;
    if (model.n_contexts * model.n_symbols > MAX_ENTRIES) return false;
    if (model.n_contexts > 1 && (model.entropy != RANS || model.predict == PALETTE)) return false;
    if ((model.entropy == INDEX) != (model.index_bits > 0)) return false;
    if (needs_float && !is_float) return false;
    if (is_full && (int64_t(model.k) > M || (model.n_contexts & (model.n_contexts - 1)))) return false;
    if (is_full && model.n_contexts > 1 && !model.n_columns) return false;
    if (is_delta != (model.remainder == STACK) && !(is_full && model.remainder == STACK)) return false;
    if (model.remainder == PLANES && !is_full) return false;
    if (model.n_columns ? !(is_full || model.predict == SCALED_DELTA) : model.predict == SCALED_DELTA) return false;
    if (model.n_columns > (model.n_words ? model.n_words : 1)) return false;
    if (model.has_column_scale && !model.n_columns) return false;
    if (is_delta && (!is_in(model.base, 0, 4096) || int64_t(model.k) >= W)) return false;
    if ((model.predict == COPY || model.predict == SCALED_DELTA || model.predict == CAST) && !model.has_reference)
        return false;
    if (model.predict == CAST &&
        (!is_in(f[P_SOURCE_EXPONENT_BITS], 1, 11) ||
         f[P_SOURCE_EXPONENT_BITS] + f[P_SOURCE_MANTISSA_BITS] + 1 != f[P_SOURCE_WORD_BITS]))
        return false;
    if (W < 64 && model.word >> W) return false;
    if (model.has_block_shifts && model.remainder != STACK) return false;
    const uint32_t n_bits = is_full ? uint32_t(M) - model.k + model.has_sign : 0;
    if (is_full && model.remainder == NO_REMAINDER && n_bits) return false;
    if (model.remainder == PLANES) {
        if (model.shift > n_bits) return false;
        for (uint32_t left = n_bits - model.shift; left; left -= model.plane_widths[model.n_planes++])
            model.plane_widths[model.n_planes] = left < 8 ? left : 8;
    } else if (model.shift) {
        return false;
    }
    return model.coded_planes >> model.n_planes == 0;
}

}  // namespace tricomp
