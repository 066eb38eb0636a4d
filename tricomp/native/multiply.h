// Products of float rows with integer weights. Stage header: no STL.
//
// Inputs become codes of 8 bits, or stay float; weights are read as they are saved. The hard thing: which form is fastest
// depends on the number of rows, and each wants its inputs laid out in its own way; so rows are made ready in blocks, and
// the number of all rows, which a task states, says the form of a block.
#pragma once

#include "multiply_floats.h"
#include "multiply_panels.h"
#include "multiply_plain.h"
#include "multiply_rows.h"

TRICOMP_BEGIN
namespace multiplying {

constexpr size_t FEW_ROWS = TRICOMP_HAS_AVX512 ? 8 : 0;  // up to so many, sums across lanes cost less than idle lanes

constexpr size_t FEW_FLOATS = 8;

INLINE bool is_few(const Multiplying& task) { return task.n_rows <= (task.is_dynamic ? FEW_ROWS : FEW_FLOATS); }

// Rows of input as codes, 16 at a time, laid out.
static void prepare_panel(const Multiplying& task, const uint8_t* input, size_t n_rows, uint8_t* scratch, uint8_t* panel) {
    const size_t stride = rounded_up(task.n_in, 64);
    float scales[PANEL_ROWS];
    int8_t* codes = reinterpret_cast<int8_t*>(scratch);
    for (size_t r = 0; r < n_rows; r++) {
        const uint8_t* row = input + 4 * r * task.n_in;
        scales[r] = scale_of(row, task.n_in);
        to_codes(row, task.n_in, scales[r], codes + r * stride);
    }
    lay_out(task, codes, stride, scales, n_rows, panel);
}

// ---- What the module calls

static MultiplyBlocks blocks(const Multiplying& task) {
    if (!task.is_dynamic && is_few(task)) return {1, rounded_up(task.n_in, 16) * 4, TILE * rounded_up(task.n_in, 16) * 4};
    if (!task.is_dynamic) return {FLOAT_PANEL, rounded_up(task.n_in * FLOAT_PANEL * 4, MULTIPLY_ALIGN), 8 * FLOAT_PART * 4};
#if TRICOMP_HAS_AVX512
    if (is_few(task)) return {1, code_bytes(task), 0};
#endif
    return {PANEL_ROWS, rounded_up(panel_bytes(task), MULTIPLY_ALIGN), PANEL_ROWS * rounded_up(task.n_in, 64)};
}

static void prepare(const Multiplying& task, const uint8_t* input, size_t n_rows, uint8_t* scratch, uint8_t* block) {
    if (!task.is_dynamic && !is_few(task)) return lay_out_floats(task, input, n_rows, block);
    if (!task.is_dynamic) {
        memcpy(block, input, 4 * task.n_in);
        memset(block + 4 * task.n_in, 0, rounded_up(task.n_in, 16) * 4 - 4 * task.n_in);
        return;
    }
#if TRICOMP_HAS_AVX512
    if (is_few(task)) return prepare_codes(task, input, block);
#endif
    prepare_panel(task, input, n_rows, scratch, block);
}

static void multiply(const Multiplying& task, const uint8_t* prepared, size_t n_rows, size_t first, size_t last,
                     uint8_t* scratch, uint8_t* out) {
    if (!task.is_dynamic && is_few(task)) return multiply_few_floats(task, prepared, n_rows, first, last, scratch, out);
#if TRICOMP_HAS_AVX512
    if (is_few(task)) return multiply_rows(task, prepared, n_rows, first, last, out);
#endif
    const MultiplyBlocks each = blocks(task);
    const Places places = {out, task.n_out, 1};
    for (size_t strip = first; strip < last; strip += STRIP) {  // its weights stay in the cache
        const size_t end = last - strip < STRIP ? last : strip + STRIP;
        for (size_t row = 0; row < n_rows; row += each.n_rows) {
            const size_t n_here = n_rows - row < each.n_rows ? n_rows - row : each.n_rows;
            const uint8_t* block = prepared + row / each.n_rows * each.n_bytes;
            if (task.is_dynamic)
                multiply_panel(task, block, n_here, strip, end, places.of(row, 0));
            else
                multiply_float_panel(task, block, n_here, strip, end, scratch, places.of(row, 0));
        }
    }
}

}  // namespace multiplying
TRICOMP_END
