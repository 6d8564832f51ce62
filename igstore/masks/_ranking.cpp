// Blocks of stored maps ranked: what igstore/masks/blocks.py says in NumPy, in a third of the time and without Python's lock.
//
// Everything is an integer until the last quotient, so the results are the same bits.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

constexpr Py_ssize_t TABLE = 1 << 16;
constexpr int DIGIT_BITS = 11, DIGITS = 3;  // they cover 32 bits
constexpr uint32_t BUCKETS = 1u << DIGIT_BITS;
constexpr uint16_t TWO_OR_MORE = 0x4000;  // this bit of a float16 is set where its absolute value is 2 or more, or NaN

struct Keyed {
    uint32_t key, block;
};

struct Scratch {
    std::vector<int32_t> sums;
    std::vector<Keyed> one, other;
    std::vector<uint32_t> counts;

    explicit Scratch(Py_ssize_t n_blocks) : sums(n_blocks), one(n_blocks), other(n_blocks), counts(DIGITS * BUCKETS) {}
};

// Sums of the scores of each block's pixels; false where a value is not below 2. SIDE is that of whole blocks: known to
// the compiler, it is a third of the time.
template <Py_ssize_t SIDE>
bool sum_blocks(const uint16_t *map, Py_ssize_t height, Py_ssize_t width, const int32_t *scores, int32_t *sum) {
    uint16_t seen = 0;
    const auto add = [&](const uint16_t *first, Py_ssize_t rows, Py_ssize_t columns) {
        int32_t total = 0;
        for (Py_ssize_t y = 0; y < rows; y++)
            for (Py_ssize_t x = 0; x < columns; x++) {
                const uint16_t bits = first[y * width + x];
                seen |= bits;
                total += scores[bits];
            }
        *sum++ = total;
    };
    for (Py_ssize_t top = 0; top < height; top += SIDE) {
        const Py_ssize_t rows = std::min(SIDE, height - top);
        const uint16_t *band = map + top * width;
        Py_ssize_t left = 0;
        if (rows == SIDE)
            for (; left + SIDE <= width; left += SIDE) add(band + left, SIDE, SIDE);
        for (; left < width; left += SIDE) add(band + left, rows, std::min(SIDE, width - left));
    }
    return !(seen & TWO_OR_MORE);
}

using SumBlocks = bool (*)(const uint16_t *, Py_ssize_t, Py_ssize_t, const int32_t *, int32_t *);

// By the blocks' side: beyond 7, sums would not fit 32 bits.
constexpr SumBlocks SUM_BLOCKS[] = {nullptr,       sum_blocks<1>, sum_blocks<2>, sum_blocks<3>,
                                    sum_blocks<4>, sum_blocks<5>, sum_blocks<6>, sum_blocks<7>};
constexpr Py_ssize_t LARGEST_BLOCK = 7;

// Blocks from the highest sum to the lowest, equal ones in their own order: a radix sort from the lowest digit on.
const Keyed *best_first(Scratch &scratch) {
    const size_t n_blocks = scratch.sums.size();
    Keyed *from = scratch.one.data(), *to = scratch.other.data();
    uint32_t *counts = scratch.counts.data();
    std::fill(counts, counts + DIGITS * BUCKETS, 0);
    for (size_t block = 0; block < n_blocks; block++) {
        // signed integers are ordered as unsigned ones with their highest bit flipped; all flipped, highest first
        const uint32_t key = ~(static_cast<uint32_t>(scratch.sums[block]) ^ 0x80000000u);
        from[block] = {key, static_cast<uint32_t>(block)};
        for (int digit = 0; digit < DIGITS; digit++)
            counts[digit * BUCKETS + (key >> (DIGIT_BITS * digit) & (BUCKETS - 1))]++;
    }
    for (int digit = 0; digit < DIGITS; digit++) {
        uint32_t *places = counts + digit * BUCKETS;
        const auto digit_of = [=](const Keyed &one) { return one.key >> (DIGIT_BITS * digit) & (BUCKETS - 1); };
        if (places[digit_of(from[0])] == n_blocks) continue;  // all have the same
        uint32_t place = 0;
        for (uint32_t bucket = 0; bucket < BUCKETS; bucket++) {
            const uint32_t count = places[bucket];
            places[bucket] = place;
            place += count;
        }
        for (size_t i = 0; i < n_blocks; i++) to[places[digit_of(from[i])]++] = from[i];
        std::swap(from, to);
    }
    return from;
}

template <typename Rank>
void rank_image(Scratch &scratch, Rank *ranks, float *shares) {
    const size_t n_blocks = scratch.sums.size();
    const Keyed *order = best_first(scratch);
    int64_t total = 0;
    for (const int32_t sum : scratch.sums) total += std::max(sum, 0);
    const float below_one = std::nextafterf(1.0f, 0.0f);
    int64_t before = 0;
    for (size_t rank = 0; rank < n_blocks; rank++) {
        const uint32_t block = order[rank].block;
        const int32_t sum = scratch.sums[block];
        ranks[block] = static_cast<Rank>(rank);
        if (sum > 0) {
            shares[block] = std::min(static_cast<float>(static_cast<double>(before) / static_cast<double>(total)), below_one);
            before += sum;
        } else {
            shares[block] = 1.0f;
        }
    }
}

struct Buffer : Py_buffer {
    Buffer() : Py_buffer{} {}
    ~Buffer() { PyBuffer_Release(this); }
};

const char RANK_DOC[] =
    "rank(maps, scores, ranks, shares, height, width, block)\n\n"
    "Fill ranks (uint16 or uint32) and shares (float32), both (image, block_y, block_x), from maps float16 (image, y, x)\n"
    "and int32 scores of the 65,536 float16 values. False, and nothing of use in them, where a value is not below 2.";

PyObject *rank(PyObject *, PyObject *args) {
    Buffer maps, scores, ranks, shares;
    Py_ssize_t height, width, block;
    if (!PyArg_ParseTuple(args, "y*y*w*w*nnn", &maps, &scores, &ranks, &shares, &height, &width, &block)) return nullptr;
    if (height < 1 || width < 1 || block < 1 || block > LARGEST_BLOCK) {
        PyErr_SetString(PyExc_ValueError, "height, width and block must be at least 1, and block at most 7");
        return nullptr;
    }
    const Py_ssize_t n_blocks = ((height + block - 1) / block) * ((width + block - 1) / block);
    const Py_ssize_t count = maps.len / (2 * height * width);
    const Py_ssize_t rank_bytes = n_blocks <= 65535 ? 2 : 4;
    if (maps.len != 2 * count * height * width || scores.len != 4 * TABLE || ranks.len != rank_bytes * count * n_blocks ||
        shares.len != 4 * count * n_blocks) {
        PyErr_SetString(PyExc_ValueError, "the arrays' sizes do not go together");
        return nullptr;
    }
    bool below_two = true, out_of_memory = false;
    Py_BEGIN_ALLOW_THREADS
    try {
        Scratch scratch(n_blocks);
        for (Py_ssize_t image = 0; image < count && below_two; image++) {
            const auto *map = static_cast<const uint16_t *>(maps.buf) + image * height * width;
            float *image_shares = static_cast<float *>(shares.buf) + image * n_blocks;
            below_two = SUM_BLOCKS[block](map, height, width, static_cast<const int32_t *>(scores.buf), scratch.sums.data());
            if (rank_bytes == 2)
                rank_image(scratch, static_cast<uint16_t *>(ranks.buf) + image * n_blocks, image_shares);
            else
                rank_image(scratch, static_cast<uint32_t *>(ranks.buf) + image * n_blocks, image_shares);
        }
    } catch (const std::bad_alloc &) {
        out_of_memory = true;
    }
    Py_END_ALLOW_THREADS
    if (out_of_memory) return PyErr_NoMemory();
    return PyBool_FromLong(below_two);
}

PyMethodDef METHODS[] = {{"rank", rank, METH_VARARGS, RANK_DOC}, {nullptr, nullptr, 0, nullptr}};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "igstore.masks._ranking", "Ranks and shares of stored maps.", -1, METHODS,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__ranking() { return PyModule_Create(&MODULE); }
