// Convolutions on CPUs, with what surrounds them; igstore/acceleration/convolutions.py says what for. Those with one tap are
// matrix products. Those with more go directly, or by Winograd's algorithm, F(4x4, 3x3) and its like.
//
// Directly, every output is the same sum in the same order wherever it lies in an image: what is equal stays equal.
// Winograd's algorithm rounds each place in a tile in its own way.
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015: a tile of 4x4 outputs is
//     A^T [ (G g G^T) * (B^T d B) ] A
// of its 6x6 inputs d and the 3x3 filter g, so 36 multiplications do what took 144. The products over channels are
// matrix products, 36 of them. A thread takes a few tiles through all three stages, so that what lies between the
// stages stays in its cache.
//
// A network's numbers wait for memory as long as they are multiplied. So what a network does to them before and after a
// convolution is done here, as they are read and as they are written: `read` and `finished` below.
//
// Sums are taken in one order, whatever the number of threads, so results are the same bits.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

#if defined(__x86_64__)
#define FOR_AVX512 __attribute__((target("avx512f")))
#define FOR_AVX2 __attribute__((target("avx2,fma")))
#endif
#define INLINE_MEMBER inline __attribute__((always_inline))  // into functions for the processor's instructions
#define INLINE static INLINE_MEMBER

namespace {

using Size = std::ptrdiff_t;

constexpr Size TILE = 4;                   // outputs of a tile along an axis that filters have taps along
constexpr Size SHARED_CACHE = 16 << 20;    // bytes of filters that stay in the cache that threads share
constexpr Size FEWEST_TILES = 14;          // below this, reading filters takes longer than multiplying by them
constexpr Size MOST_PIXELS = 224;          // the same of filters with one tap,
constexpr Size PIXELS_TOGETHER = 28;       // of which so many are multiplied while the next ones are fetched
constexpr Size DIRECT_OUTPUTS = 56;        // of a tile of a direct convolution, at most
constexpr Size LINE = 16;                  // floats of a cache line
constexpr Size MOST_TILES = 256;           // for filters that are read from memory for each block of tiles
constexpr Size FEWEST_CHANNELS = 64;       // below this, transforming inputs does
constexpr Size APART = 16;                 // floats between planes: a power of two would have them share cache lines

// All arrays are contiguous float32.
struct Convolution {
    const float *inputs;   // (image, y, x, channel)
    // By Winograd's algorithm (product, group of output channels, channel, output channel of the group), directly
    // (group of output channels, tap, channel, output channel of the group); with one tap these are the same.
    const float *filters;
    float *outputs;        // (image, y, x, output channel)

    // What is done to inputs as they are read. All of this may be null.
    const float *gate;           // as inputs: 0 takes the place of those whose gate is not between its bounds,
    float gate_low, gate_high;   //
    float *gated;                // and this is where they are kept (one tap)
    const float *scale, *shift;  // (channel): of inputs x, max(scale x + shift, 0) is read (one tap);
    const float *rectified;      // or, as outputs, the x of which outputs are made gradients, by output channel

    // What is done to outputs as they are written.
    const float *bias;    // (output channel), or null
    const float *addend;  // as outputs, or null
    float low, high;      // bounds that they are brought within

    Size height, width, channels, out_height, out_width, out_channels;
    Size taps_y, taps_x, padding_y, padding_x;
    bool direct;
    Size tile_y, tile_x;           // outputs of a tile
    Size tiles_y, tiles_x, tiles;  // tiles: of all images
    Size products;                 // matrix products
    Size per_block;                // tiles that go through the stages together
    Size per_part;                 // output channels that do
};

template <int LANES>
struct Vector {
    typedef float Type __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
    typedef int Bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
};

// Transforms along one axis, by interpolation at 0, at PAIRS points and their negatives, and at infinity, for filters of
// 2 PAIRS - 1 taps (Toom and Cook's way to them, of which Lavin and Gray's is PAIRS = 2). The points are those of least
// rounding. With PAIRS = 0 there is but one tap, and nothing to transform.
constexpr float POINTS[] = {1.0f, 2.0f, 0.5f, 1.25f};

template <int PAIRS>
struct Axis {
    static constexpr int FROM = 2 * PAIRS + 2, TO = TILE;  // inputs and outputs of a tile

    // Coefficients of the product of (z - point^2) over all points but one, from the constant on.
    struct Polynomial {
        float at[PAIRS + 1];
    };
    static constexpr Polynomial without(int left_out) {
        Polynomial product{};
        product.at[0] = 1.0f;
        int degree = 0;
        for (int i = 0; i < PAIRS; i++) {
            if (i == left_out) continue;
            degree++;
            for (int k = degree; k >= 0; k--)
                product.at[k] = (k > 0 ? product.at[k - 1] : 0.0f) - POINTS[i] * POINTS[i] * product.at[k];
        }
        return product;
    }

    // B^T d. Its rows are the polynomials that are 0 at all points but one.
    template <typename V>
    INLINE void inputs(const V *d, V *to, Size stride) {
        constexpr Polynomial all = without(-1);
        V first = all.at[0] * d[0], last = all.at[0] * d[1];
#pragma GCC unroll 8
        for (int k = 1; k <= PAIRS; k++) {
            first += all.at[k] * d[2 * k];
            last += all.at[k] * d[2 * k + 1];
        }
        to[0] = first;
        to[(FROM - 1) * stride] = last;
#pragma GCC unroll 8
        for (int i = 0; i < PAIRS; i++) {
            const Polynomial others = without(i);
            V even = others.at[0] * d[2], odd = others.at[0] * d[1];
#pragma GCC unroll 8
            for (int k = 1; k < PAIRS; k++) {
                even += others.at[k] * d[2 * k + 2];
                odd += others.at[k] * d[2 * k + 1];
            }
            to[(2 * i + 1) * stride] = even + POINTS[i] * odd;
            to[(2 * i + 2) * stride] = even - POINTS[i] * odd;
        }
    }

    // A^T m. Its columns are the powers of the points, from 0 to 3.
    template <typename V>
    INLINE void products(const V *m, V *to, Size stride) {
        V sums[TO] = {m[0], V{}, V{}, m[FROM - 1]};
#pragma GCC unroll 8
        for (int i = 0; i < PAIRS; i++) {
            const float point = POINTS[i];
            const V sum = m[2 * i + 1] + m[2 * i + 2], difference = m[2 * i + 1] - m[2 * i + 2];
            sums[0] += sum;
            sums[1] += point * difference;
            sums[2] += point * point * sum;
            sums[3] += point * point * point * difference;
        }
#pragma GCC unroll 8
        for (int k = 0; k < TO; k++) to[k * stride] = sums[k];
    }
};

template <>
struct Axis<0> {
    static constexpr int FROM = 1, TO = 1;

    template <typename V>
    INLINE void inputs(const V *d, V *to, Size) {
        to[0] = d[0];
    }
    template <typename V>
    INLINE void products(const V *m, V *to, Size) {
        to[0] = m[0];
    }
};

template <int LANES, typename V = typename Vector<LANES>::Type>
INLINE V load(const float *at) {
    return *(const V *)at;
}

// Past the caches, which hold other things by the time that anyone reads it: they would have to fetch first what it
// overwrites. `to` is aligned as vectors are.
template <typename V>
INLINE void store_in_memory(float *to, V value) {
#if defined(__x86_64__)
    asm volatile("vmovntps %1, %0" : "=m"(*(V *)to) : "v"(value));
#else
    *(V *)to = value;
#endif
}

// After it, other threads see what was stored in memory.
INLINE void finish_storing() {
#if defined(__x86_64__)
    asm volatile("sfence" ::: "memory");
#endif
}

// `value` where `sign` is below 0, else 0. g++ 12 makes no vector instructions of a choice by comparison here.
template <int LANES, typename V>
INLINE V where_negative(V sign, V value) {
    using Bits = typename Vector<LANES>::Bits;
    return (V)((Bits)value & ((Bits)sign >> 31));
}

// What `gate` lets through: the inputs where it is between its bounds.
template <int LANES, typename V>
INLINE V pass(const Convolution &c, V value, V gate) {
    return where_negative<LANES>(c.gate_low - gate, where_negative<LANES>(gate - c.gate_high, value));
}

// An output (or its bias and the sums over channels) as it is written to outputs[offset].
template <int LANES, typename V>
INLINE V finished(const Convolution &c, Size offset, Size channel, V value) {
    if (c.rectified) {
        const V scale = load<LANES>(c.scale + channel);
        const V at = scale * load<LANES>(c.rectified + offset) + load<LANES>(c.shift + channel);
        value = where_negative<LANES>(0.0f - at, scale * value);
    }
    if (c.addend) value += load<LANES>(c.addend + offset);
    const V low = V{} + c.low, high = V{} + c.high;
    value = value < low ? low : value;
    return value > high ? high : value;
}

struct Place {
    Size image, y, x;  // of a tile's first output
};

INLINE Place place_of(const Convolution &c, Size tile) {
    const Size a_image = c.tiles_y * c.tiles_x;
    return {tile / a_image, c.tile_y * (tile / c.tiles_x % c.tiles_y), c.tile_x * (tile % c.tiles_x)};
}

template <int LANES, typename Y, typename X>
INLINE void read_tile(const Convolution &c, const Place &place, const float *zeros, float *to, Size plane) {
    using V = typename Vector<LANES>::Type;
    const float *at[Y::FROM][X::FROM], *gate[Y::FROM][X::FROM];
    for (int i = 0; i < Y::FROM; i++)
        for (int j = 0; j < X::FROM; j++) {
            const Size y = place.y + i - c.padding_y, x = place.x + j - c.padding_x;
            const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
            const Size offset = ((place.image * c.height + y) * c.width + x) * c.channels;
            at[i][j] = inside ? c.inputs + offset : zeros;
            if (c.gate) gate[i][j] = inside ? c.gate + offset : zeros;
        }
    for (Size channel = 0; channel < c.channels; channel += LANES) {
        V half[Y::FROM][X::FROM], whole[X::FROM];
        for (int j = 0; j < X::FROM; j++) {
            V column[Y::FROM];
            for (int i = 0; i < Y::FROM; i++) column[i] = load<LANES>(at[i][j] + channel);
            if (c.gate)
                for (int i = 0; i < Y::FROM; i++) column[i] = pass<LANES>(c, column[i], load<LANES>(gate[i][j] + channel));
            Y::inputs(column, &half[0][j], X::FROM);
        }
        for (int i = 0; i < Y::FROM; i++) {
            X::inputs(half[i], whole, 1);
            for (int j = 0; j < X::FROM; j++) *(V *)(to + (X::FROM * i + j) * plane + channel) = whole[j];
        }
    }
}

template <int LANES, typename Y, typename X>
INLINE void write_tile(const Convolution &c, const Place &place, Size first, Size last, const float *from, Size plane) {
    using V = typename Vector<LANES>::Type;
    const Size rows = std::min<Size>(Y::TO, c.out_height - place.y);
    const Size columns = std::min<Size>(X::TO, c.out_width - place.x);
    const Size to = ((place.image * c.out_height + place.y) * c.out_width + place.x) * c.out_channels;
    for (Size channel = first; channel < last; channel += LANES) {
        V half[Y::TO][X::FROM], whole[X::TO], bias = {};
        if (c.bias) bias = load<LANES>(c.bias + channel);
        for (int j = 0; j < X::FROM; j++) {
            V column[Y::FROM];
            for (int i = 0; i < Y::FROM; i++) column[i] = load<LANES>(from + (X::FROM * i + j) * plane + channel - first);
            Y::products(column, &half[0][j], X::FROM);
        }
        for (Size i = 0; i < rows; i++) {
            X::products(half[i], whole, 1);
            for (Size j = 0; j < columns; j++) {
                const Size offset = to + (i * c.out_width + j) * c.out_channels + channel;
                store_in_memory(c.outputs + offset, finished<LANES>(c, offset, channel, whole[j] + bias));
            }
        }
    }
}

// Where products go that Winograd's algorithm transforms next.
struct ToScratch {
    float *to;
    Size stride;

    template <int LANES, typename V = typename Vector<LANES>::Type>
    INLINE_MEMBER V start(Size, Size) const {
        return V{};
    }
    template <int LANES, typename V>
    INLINE_MEMBER void put(Size row, Size column, V value) const {
        *(V *)(to + row * stride + column) = value;
    }
};

// Where products go that are outputs already.
struct ToOutputs {
    const Convolution &c;
    Size first_row, first_channel;

    template <int LANES, typename V = typename Vector<LANES>::Type>
    INLINE_MEMBER V start(Size row, Size column) const {
        // so that it has come by the time that `put` wants it
        const Size offset = (first_row + row) * c.out_channels + first_channel + column;
        if (c.addend) __builtin_prefetch(c.addend + offset);
        if (c.rectified) __builtin_prefetch(c.rectified + offset);
        return c.bias ? load<LANES>(c.bias + first_channel + column) : V{};
    }
    template <int LANES, typename V>
    INLINE_MEMBER void put(Size row, Size column, V value) const {
        const Size channel = first_channel + column, offset = (first_row + row) * c.out_channels + channel;
        store_in_memory(c.outputs + offset, finished<LANES>(c, offset, channel, value));
    }
};

// Matrices of a product: (row, inner) times (inner, 2 LANES); or of a sum of products, one for each tap of a filter.
struct Factors {
    const float *a;
    Size stride;  // of the rows of a
    const float *b;
    Size inner;
    const float *next[2];  // what to fetch meanwhile: so many cache lines of the first, and of the second, if any
    Size lines;
    Size taps_y = 1, taps_x = 1;  // of which b has the factors one after the other
    Size tap_y = 0, tap_x = 0;    // from the a of a tap to that of the next one along an axis
};

// ROWS rows of a product, and VECTORS vectors of its columns. All of it but the inputs is in registers.
template <int LANES, int VECTORS, int ROWS, typename To>
INLINE void multiply_rows(const Factors &factors, Size first_row, const To &to) {
    using V = typename Vector<LANES>::Type;
    const float *first = factors.a + first_row * factors.stride, *b = factors.b;
    V sums[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) sums[row][v] = to.template start<LANES>(first_row + row, v * LANES);
    for (Size y = 0; y < factors.taps_y; y++)
        for (Size x = 0; x < factors.taps_x; x++) {
            const float *a = first + y * factors.tap_y + x * factors.tap_x;
            for (Size k = 0; k < factors.inner; k++, b += 2 * LANES) {
                if (k < factors.lines) {
                    __builtin_prefetch(factors.next[0] + LINE * k, 0, 2);
                    if (factors.next[1]) __builtin_prefetch(factors.next[1] + LINE * k, 0, 2);
                }
                V from[VECTORS];
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; v++) from[v] = load<LANES>(b + v * LANES);
#pragma GCC unroll 16
                for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 2
                    for (int v = 0; v < VECTORS; v++) sums[row][v] += a[row * factors.stride + k] * from[v];
            }
        }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) to.template put<LANES>(first_row + row, v * LANES, sums[row][v]);
}

template <int LANES, int VECTORS, int ROWS, typename To>
INLINE void multiply_few(Size rows, const Factors &factors, Size first_row, const To &to) {
    if (rows == ROWS)
        multiply_rows<LANES, VECTORS, ROWS>(factors, first_row, to);
    else if constexpr (ROWS > 1)
        multiply_few<LANES, VECTORS, ROWS - 1>(rows, factors, first_row, to);
}

// MOST_ROWS is what the registers hold: rows are dealt out evenly, so that no call gets one or two of them.
template <int LANES, int MOST_ROWS, typename To>
INLINE void multiply(Size rows, Size columns, Factors factors, const To &to) {
    const Size calls = (rows + MOST_ROWS - 1) / MOST_ROWS;
    factors.lines = (factors.lines + calls - 1) / calls;
    for (Size call = 0; call < calls; call++) {
        const Size first = rows * call / calls, last = rows * (call + 1) / calls;
        if (columns > LANES)
            multiply_few<LANES, 2, MOST_ROWS>(last - first, factors, first, to);
        else
            multiply_few<LANES, 1, MOST_ROWS>(last - first, factors, first, to);
        factors.next[0] += LINE * factors.lines;
        if (factors.next[1]) factors.next[1] += LINE * factors.lines;
    }
}

Size round_up(Size size, Size multiple) { return (size + multiple - 1) / multiple * multiple; }

// What a thread has between the stages; it is kept for the next convolution.
class Scratch {
  public:
    float *of(Size floats) {
        if (floats > size_) {
            data_.reset();  // first, so that both are never there
            size_ = 0;
            data_.reset(static_cast<float *>(::operator new(sizeof(float) * floats, std::align_val_t(64))));
            size_ = floats;
        }
        return data_.get();
    }

  private:
    struct Free {
        void operator()(float *data) const { ::operator delete(data, std::align_val_t(64)); }
    };
    std::unique_ptr<float, Free> data_;
    Size size_ = 0;
};

struct Range {
    Size first, last;

    Size count() const { return last - first; }
};

Range tiles_of(const Convolution &c, Size block) {
    return {block * c.per_block, std::min((block + 1) * c.per_block, c.tiles)};
}

Range channels_of(const Convolution &c, Size part) {
    return {part * c.per_part, std::min((part + 1) * c.per_part, c.out_channels)};
}

// All stages of some tiles and some output channels.
template <int LANES, int MOST_ROWS, typename Y, typename X>
INLINE void convolve_tiles(const Convolution &c, Range tiles, Range to_channels, Scratch &scratch) {
    constexpr Size GROUP = 2 * LANES, PRODUCTS = Y::FROM * X::FROM;
    const Size width = round_up(to_channels.count(), GROUP);
    const Size from_plane = c.per_block * c.channels + APART, to_plane = c.per_block * width + APART;
    float *from = scratch.of(PRODUCTS * (from_plane + to_plane) + c.channels), *to = from + PRODUCTS * from_plane;
    float *zeros = to + PRODUCTS * to_plane;
    std::fill(zeros, zeros + c.channels, 0.0f);
    for (Size tile = 0; tile < tiles.count(); tile++)
        read_tile<LANES, Y, X>(c, place_of(c, tiles.first + tile), zeros, from + tile * c.channels, from_plane);
    const Size groups = round_up(c.out_channels, GROUP) / GROUP;
    for (Size product = 0; product < PRODUCTS; product++)
        for (Size channel = 0; channel < to_channels.count(); channel += GROUP) {
            const Size group = product * groups + (to_channels.first + channel) / GROUP;
            const float *filters = c.filters + group * c.channels * GROUP;
            const Factors factors{from + product * from_plane, c.channels, filters, c.channels, {}, 0};
            const ToScratch products{to + product * to_plane + channel, width};
            multiply<LANES, MOST_ROWS>(tiles.count(), to_channels.count() - channel, factors, products);
        }
    for (Size tile = 0; tile < tiles.count(); tile++)
        write_tile<LANES, Y, X>(c, place_of(c, tiles.first + tile), to_channels.first, to_channels.last,
                                to + tile * width, to_plane);
}

// The same of filters with one tap, whose tiles are pixels. Inputs are copied, to rows that do not share cache lines.
template <int LANES, int MOST_ROWS>
INLINE void convolve_pixels(const Convolution &c, Range pixels, Range to_channels, Scratch &scratch) {
    using V = typename Vector<LANES>::Type;
    constexpr Size GROUP = 2 * LANES;
    const Size stride = c.channels + APART;
    float *rows = scratch.of(PIXELS_TOGETHER * stride);
    for (Size first = pixels.first; first < pixels.last; first += PIXELS_TOGETHER) {
        const Size count = std::min(PIXELS_TOGETHER, pixels.last - first);
        for (Size row = 0; row < count; row++) {
            const Size offset = (first + row) * c.channels;
            for (Size channel = 0; channel < c.channels; channel += LANES) {
                V value = load<LANES>(c.inputs + offset + channel);
                if (c.gate) value = pass<LANES>(c, value, load<LANES>(c.gate + offset + channel));
                if (c.gated && to_channels.first == 0) store_in_memory(c.gated + offset + channel, value);
                if (c.scale && !c.rectified) {
                    value = load<LANES>(c.scale + channel) * value + load<LANES>(c.shift + channel);
                    value = value < 0.0f ? V{} : value;
                }
                *(V *)(rows + row * stride + channel) = value;
            }
        }
        // the rows that come next are fetched meanwhile, a share of them for each group
        const Size end = std::min(first + count + PIXELS_TOGETHER, pixels.last) * c.channels;
        const Size groups = (to_channels.count() + GROUP - 1) / GROUP;
        Size next = (first + count) * c.channels;
        const Size share = (std::max<Size>(0, end - next) / LINE + groups - 1) / groups;
        for (Size channel = to_channels.first; channel < to_channels.last; channel += GROUP) {
            const Factors factors{rows, stride, c.filters + channel * c.channels, c.channels,
                                  {c.inputs + next, c.gate ? c.gate + next : nullptr}, share};
            multiply<LANES, MOST_ROWS>(count, to_channels.last - channel, factors, ToOutputs{c, first, channel});
            next += LINE * share;
        }
    }
}

// The same of filters with more taps, each output a sum over taps and channels. Inputs are copied, with the zeros around
// them, so that the pixels of a tap are rows of a matrix that lie apart by the same distance everywhere.
template <int LANES, int MOST_ROWS>
INLINE void convolve_directly(const Convolution &c, Range tiles, Range to_channels, Scratch &scratch) {
    using V = typename Vector<LANES>::Type;
    constexpr Size GROUP = 2 * LANES;
    const Size pixel = c.channels + APART, row = (c.tile_x + c.taps_x - 1) * pixel, taps = c.taps_y * c.taps_x;
    float *copy = scratch.of((c.tile_y + c.taps_y - 1) * row);
    for (Size tile = tiles.first; tile < tiles.last; tile++) {
        const Place place = place_of(c, tile);
        const Size rows = std::min(c.tile_y, c.out_height - place.y), columns = std::min(c.tile_x, c.out_width - place.x);
        for (Size i = 0; i < rows + c.taps_y - 1; i++)
            for (Size j = 0; j < columns + c.taps_x - 1; j++) {
                const Size y = place.y + i - c.padding_y, x = place.x + j - c.padding_x;
                float *to = copy + i * row + j * pixel;
                if (y >= 0 && y < c.height && x >= 0 && x < c.width) {
                    const float *from = c.inputs + ((place.image * c.height + y) * c.width + x) * c.channels;
                    for (Size channel = 0; channel < c.channels; channel += LANES)
                        *(V *)(to + channel) = load<LANES>(from + channel);
                } else {
                    std::fill(to, to + c.channels, 0.0f);
                }
            }
        for (Size channel = to_channels.first; channel < to_channels.last; channel += GROUP)
            for (Size i = 0; i < rows; i++) {
                const Factors factors{copy + i * row, pixel,    c.filters + channel * taps * c.channels,
                                      c.channels,     {},       0,
                                      c.taps_y,       c.taps_x, row,
                                      pixel};
                const Size first = (place.image * c.out_height + place.y + i) * c.out_width + place.x;
                multiply<LANES, MOST_ROWS>(columns, to_channels.last - channel, factors, ToOutputs{c, first, channel});
            }
    }
}

// By the taps of the filters; others there are none.
template <int LANES, int MOST_ROWS>
INLINE void convolve_some(const Convolution &c, Range tiles, Range channels, Scratch &scratch) {
    if (c.direct) return convolve_directly<LANES, MOST_ROWS>(c, tiles, channels, scratch);
    switch (10 * c.taps_y + c.taps_x) {
        case 11: return convolve_pixels<LANES, MOST_ROWS>(c, tiles, channels, scratch);
        case 33: return convolve_tiles<LANES, MOST_ROWS, Axis<2>, Axis<2>>(c, tiles, channels, scratch);
        case 13: return convolve_tiles<LANES, MOST_ROWS, Axis<0>, Axis<2>>(c, tiles, channels, scratch);
        case 31: return convolve_tiles<LANES, MOST_ROWS, Axis<2>, Axis<0>>(c, tiles, channels, scratch);
        case 55: return convolve_tiles<LANES, MOST_ROWS, Axis<3>, Axis<3>>(c, tiles, channels, scratch);
        case 17: return convolve_tiles<LANES, MOST_ROWS, Axis<0>, Axis<4>>(c, tiles, channels, scratch);
        case 71: return convolve_tiles<LANES, MOST_ROWS, Axis<4>, Axis<0>>(c, tiles, channels, scratch);
    }
}

bool has_taps(Size y, Size x) {
    const Size both = 10 * y + x;
    return both == 11 || both == 33 || both == 13 || both == 31 || both == 55 || both == 17 || both == 71;
}

using Worker = void (*)(const Convolution &, Range, Range, Scratch &);

struct Processor {
    Size group;  // output channels that are worked on together; 0: of no use here
    Worker work;
};

#if defined(__x86_64__)
FOR_AVX512 void convolve_avx512(const Convolution &c, Range tiles, Range channels, Scratch &scratch) {
    convolve_some<16, 14>(c, tiles, channels, scratch);
}
FOR_AVX2 void convolve_avx2(const Convolution &c, Range tiles, Range channels, Scratch &scratch) {
    convolve_some<8, 6>(c, tiles, channels, scratch);
}
Processor processor() {
#ifndef WITHOUT_AVX512  // defined where tests want to see the other one
    if (__builtin_cpu_supports("avx512f")) return {32, convolve_avx512};
#endif
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {16, convolve_avx2};
    return {0, nullptr};
}
#elif defined(__aarch64__)
void convolve_neon(const Convolution &c, Range tiles, Range channels, Scratch &scratch) {
    convolve_some<4, 12>(c, tiles, channels, scratch);
}
Processor processor() { return {8, convolve_neon}; }
#else
Processor processor() { return {0, nullptr}; }
#endif

Size share(Size size, Size most) {  // of equal parts, none larger than `most`
    const Size parts = (size + most - 1) / most;
    return (size + parts - 1) / parts;
}

void lay_tiles(Convolution &c, Size images) {
    if (c.direct) {
        c.tile_x = share(c.out_width, DIRECT_OUTPUTS);
        c.tile_y = share(c.out_height, std::max<Size>(1, DIRECT_OUTPUTS / c.tile_x));
        c.products = c.taps_y * c.taps_x;
    } else {
        c.tile_y = c.taps_y > 1 ? TILE : 1;
        c.tile_x = c.taps_x > 1 ? TILE : 1;
        c.products = (c.tile_y + c.taps_y - 1) * (c.tile_x + c.taps_x - 1);
    }
    c.tiles_y = (c.out_height + c.tile_y - 1) / c.tile_y;
    c.tiles_x = (c.out_width + c.tile_x - 1) / c.tile_x;
    c.tiles = images * c.tiles_y * c.tiles_x;
}

// Blocks are small, so that what lies between the stages fits a thread's own cache, but where filters come from memory;
// and as many as busy all threads: where tiles are few, threads share them and divide the output channels.
void divide(Convolution &c, Size group, Size threads) {
    const Size bytes = sizeof(float) * c.products * c.channels * c.out_channels;
    const Size few = c.direct ? 1 : c.products > 1 ? FEWEST_TILES : MOST_PIXELS;
    const Size fitting = c.direct || bytes <= SHARED_CACHE ? few : MOST_TILES;
    Size blocks = round_up((c.tiles + fitting - 1) / fitting, threads);
    blocks = std::max<Size>(1, std::min(blocks, c.tiles / (c.direct ? 1 : FEWEST_TILES)));
    c.per_block = (c.tiles + blocks - 1) / blocks;
    Size parts = 1;
    while (blocks * parts < threads && c.out_channels / (2 * parts) >= FEWEST_CHANNELS) parts *= 2;
    c.per_part = round_up((c.out_channels + parts - 1) / parts, group);
}

const char CONVOLVE_DOC[] =
    "convolve(inputs, filters, outputs, gate, gated, scale, shift, rectified, bias, addend,\n"
    "         images, height, width, channels, out_channels, taps_y, taps_x, padding_y, padding_x, threads,\n"
    "         direct, gate_low, gate_high, low, high)\n\n"
    "Addresses of the arrays (from gate on they may be 0), sizes, whether to go without Winograd's algorithm (and without\n"
    "a gate, if there are more taps than one), then bounds. Nothing is checked.";

PyObject *convolve(PyObject *, PyObject *args) {
    unsigned long long inputs, filters, outputs, gate, gated, scale, shift, rectified, bias, addend;
    Py_ssize_t images, threads;
    int direct;
    Convolution c{};
    if (!PyArg_ParseTuple(args, "KKKKKKKKKKnnnnnnnnnnpffff", &inputs, &filters, &outputs, &gate, &gated, &scale, &shift,
                          &rectified, &bias, &addend, &images, &c.height, &c.width, &c.channels, &c.out_channels,
                          &c.taps_y, &c.taps_x, &c.padding_y, &c.padding_x, &threads, &direct, &c.gate_low, &c.gate_high,
                          &c.low, &c.high))
        return nullptr;
    if (!has_taps(c.taps_y, c.taps_x)) {
        PyErr_SetString(PyExc_ValueError, "filters have 1x1, 3x3, 1x3, 3x1, 5x5, 1x7 or 7x1 taps");
        return nullptr;
    }
    const Processor with = processor();
    if (!with.work) {
        PyErr_SetString(PyExc_RuntimeError, "this processor lacks the instructions");
        return nullptr;
    }
    c.inputs = reinterpret_cast<const float *>(inputs);
    c.filters = reinterpret_cast<const float *>(filters);
    c.outputs = reinterpret_cast<float *>(outputs);
    c.gate = reinterpret_cast<const float *>(gate);
    c.gated = reinterpret_cast<float *>(gated);
    c.scale = reinterpret_cast<const float *>(scale);
    c.shift = reinterpret_cast<const float *>(shift);
    c.rectified = reinterpret_cast<const float *>(rectified);
    c.bias = reinterpret_cast<const float *>(bias);
    c.addend = reinterpret_cast<const float *>(addend);
    c.out_height = c.height + 2 * c.padding_y - c.taps_y + 1;
    c.out_width = c.width + 2 * c.padding_x - c.taps_x + 1;
    c.direct = direct && c.taps_y * c.taps_x > 1;
    lay_tiles(c, images);
    divide(c, with.group, threads);
    const Size blocks = (c.tiles + c.per_block - 1) / c.per_block;
    const Size parts = (c.out_channels + c.per_part - 1) / c.per_part;
    bool out_of_memory = false;
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(threads))
    for (Size item = 0; item < blocks * parts; item++) {
        static thread_local Scratch scratch;
        try {
            with.work(c, tiles_of(c, item / parts), channels_of(c, item % parts), scratch);
            finish_storing();
        } catch (const std::bad_alloc &) {
#pragma omp atomic write
            out_of_memory = true;
        }
    }
    Py_END_ALLOW_THREADS
    if (out_of_memory) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyMethodDef METHODS[] = {{"convolve", convolve, METH_VARARGS, CONVOLVE_DOC}, {nullptr, nullptr, 0, nullptr}};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT,
                      "igstore.acceleration._convolutions",
                      "Convolutions, and what surrounds them; GROUP is 0 where the processor has no instructions for it.",
                      -1,
                      METHODS,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__convolutions() {
    PyObject *module = PyModule_Create(&MODULE);
    if (module && PyModule_AddIntConstant(module, "GROUP", static_cast<long>(processor().group)) < 0) {
        Py_DECREF(module);
        return nullptr;
    }
    return module;
}
