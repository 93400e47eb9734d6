// Resizing RGB images: by pixel areas and bilinearly, with the arithmetic of OpenCV's INTER_AREA and INTER_LINEAR.
//
// The order of every sum and rounding is OpenCV's, so results are its bits; what differs is that three channels go
// through vector registers together and that a mirrored image costs nothing. Only whole reductions of both sides, which
// OpenCV sums otherwise, are refused. Compiled without contraction of a * b + c: that would change bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define BEST_CODE __attribute__((target_clones("avx2", "default")))
#else
#define BEST_CODE
#endif

namespace {

constexpr int kSlack = 8;  // values readable and writable past a row: vectors take a fourth channel along

// ---- By areas: both sides shrink (or stay) ------------------------------------------------------------------------

struct Tap {
    int32_t source;
    float weight;
};

// What each of `wanted` outputs takes from `size` pixels: taps in order; ends[i] is one past the last tap of output i.
void area_taps(int32_t size, int32_t wanted, double scale, std::vector<Tap> &taps, std::vector<int32_t> &ends) {
    taps.clear();
    ends.clear();
    for (int32_t place = 0; place < wanted; ++place) {
        const double begin = place * scale, end = begin + scale;
        const double width = std::min(scale, size - begin);
        const int32_t last = std::min(static_cast<int32_t>(std::floor(end)), size - 1);
        const int32_t first = std::min(static_cast<int32_t>(std::ceil(begin)), last);
        if (first - begin > 1e-3) taps.push_back({first - 1, static_cast<float>((first - begin) / width)});
        for (int32_t pixel = first; pixel < last; ++pixel) taps.push_back({pixel, static_cast<float>(1.0 / width)});
        if (end - last > 1e-3)
            taps.push_back({last, static_cast<float>(std::min(std::min(end - last, 1.0), width) / width)});
        ends.push_back(static_cast<int32_t>(taps.size()));
    }
}

// The same taps for columns, as many for every output: 0 in front where there are fewer, or where the row would end.
struct Columns {
    int32_t taps = 0;
    std::vector<int32_t> offsets;  // of the first tap's pixel, in values
    std::vector<float> weights;    // [wanted, taps]
};

void area_columns(int32_t size, int32_t wanted, double scale, bool mirror, Columns &columns) {
    thread_local std::vector<Tap> taps;
    thread_local std::vector<int32_t> ends;
    area_taps(size, wanted, scale, taps, ends);
    columns.taps = 1;
    for (int32_t place = 0; place < wanted; ++place)
        columns.taps = std::max(columns.taps, ends[place] - (place ? ends[place - 1] : 0));
    columns.offsets.assign(wanted, 0);
    columns.weights.assign(static_cast<size_t>(wanted) * columns.taps, 0.0f);
    for (int32_t place = 0; place < wanted; ++place) {
        const int32_t begin = place ? ends[place - 1] : 0;
        const int32_t start = std::min(taps[begin].source, size - columns.taps);
        const int32_t target = mirror ? wanted - 1 - place : place;
        columns.offsets[target] = 3 * start;
        for (int32_t tap = begin; tap < ends[place]; ++tap)
            columns.weights[static_cast<size_t>(target) * columns.taps + (taps[tap].source - start)] = taps[tap].weight;
    }
}

BEST_CODE void to_floats(const uint8_t *source, int32_t count, float *row) {
    for (int32_t place = 0; place < count; ++place) row[place] = static_cast<float>(source[place]);
}

// One row: out[3 * i + c] = sum over taps of weight * row, tap after tap. Writes one value past the end.
template <int32_t kTaps>
void mix_columns(const float *row, const Columns &columns, int32_t wanted, float *out) {
    const int32_t taps = kTaps ? kTaps : columns.taps;
    const float *weight = columns.weights.data();
    for (int32_t place = 0; place < wanted; ++place, weight += taps, out += 3) {
        const float *pixel = row + columns.offsets[place];
#if defined(__SSE2__)
        __m128 sum = _mm_mul_ps(_mm_loadu_ps(pixel), _mm_set1_ps(weight[0]));
        for (int32_t tap = 1; tap < taps; ++tap)
            sum = _mm_add_ps(sum, _mm_mul_ps(_mm_loadu_ps(pixel + 3 * tap), _mm_set1_ps(weight[tap])));
        _mm_storeu_ps(out, sum);
#else
        for (int32_t channel = 0; channel < 3; ++channel) {
            float sum = pixel[channel] * weight[0];
            for (int32_t tap = 1; tap < taps; ++tap) sum += pixel[3 * tap + channel] * weight[tap];
            out[channel] = sum;
        }
#endif
    }
}

using Mix = void (*)(const float *, const Columns &, int32_t, float *);

Mix mix_for(int32_t taps) {
    switch (taps) {
        case 1: return mix_columns<1>;
        case 2: return mix_columns<2>;
        case 3: return mix_columns<3>;
        case 4: return mix_columns<4>;
        default: return mix_columns<0>;
    }
}

BEST_CODE void begin_sum(const float *row, float weight, int32_t count, float *sum) {
    for (int32_t place = 0; place < count; ++place) sum[place] = weight * row[place];
}

BEST_CODE void add_to_sum(const float *row, float weight, int32_t count, float *sum) {
    for (int32_t place = 0; place < count; ++place) sum[place] += weight * row[place];
}

// To the nearest byte, halves to even: adding 2^23 leaves the rounded number in the low bits.
BEST_CODE void to_bytes(const float *sum, int32_t count, uint8_t *out) {
    for (int32_t place = 0; place < count; ++place) {
        const float shifted = sum[place] + 8388608.0f;
        int32_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        out[place] = static_cast<uint8_t>(std::min(bits - 0x4B000000, 255));
    }
}

struct Image {
    const uint8_t *pixels;
    int64_t stride;
    int32_t height, width;
};

void by_areas(const Image &from, uint8_t *out, int32_t height, int32_t width, double down, double across, bool mirror) {
    thread_local Columns columns;
    thread_local std::vector<Tap> taps;
    thread_local std::vector<int32_t> ends;
    thread_local std::vector<float> row, mixed, sum;
    area_columns(from.width, width, across, mirror, columns);
    area_taps(from.height, height, down, taps, ends);
    const int32_t values = 3 * width;
    row.resize(3 * from.width + kSlack);
    mixed.resize(values + kSlack);
    sum.resize(values + kSlack);
    const Mix mix = mix_for(columns.taps);
    int32_t there = -1, tap = 0;
    for (int32_t line = 0; line < height; ++line) {
        for (const int32_t begin = tap; tap < ends[line]; ++tap) {
            if (taps[tap].source != there) {
                there = taps[tap].source;
                to_floats(from.pixels + there * from.stride, 3 * from.width, row.data());
                mix(row.data(), columns, width, mixed.data());
            }
            (tap == begin ? begin_sum : add_to_sum)(mixed.data(), taps[tap].weight, values, sum.data());
        }
        to_bytes(sum.data(), values, out + static_cast<int64_t>(line) * values);
    }
}

// ---- Bilinear, in whole numbers of 1/2048 --------------------------------------------------------------------------

struct Pair {
    int32_t first;         // pixel, or row (may be -1); the other is the next one
    int16_t near_, far_;   // their weights
};

int16_t fixed(float share) { return static_cast<int16_t>(std::lrint(share * 2048.0f)); }

// `areas`: OpenCV's INTER_AREA where a side grows: pixels keep their areas, and only outputs on a border are mixed.
Pair pair(int32_t place, double scale, double inverse, bool areas) {
    int32_t first;
    float share;
    if (areas) {
        first = static_cast<int32_t>(std::floor(place * scale));
        share = static_cast<float>((place + 1) - (first + 1) * inverse);
        share = share <= 0 ? 0.0f : share - std::floor(share);
    } else {
        share = static_cast<float>((place + 0.5) * scale - 0.5);
        first = static_cast<int32_t>(std::floor(share));
        share -= static_cast<float>(first);
    }
    return {first, fixed(1.0f - share), fixed(share)};
}

Pair within(Pair found, int32_t size) {
    if (found.first < 0) return {0, 2048, 0};
    if (found.first >= size - 1) return {size - 1, 2048, 0};
    return found;
}

// One row, in 1/128: (near * pixel + far * next pixel) / 16. Writes one value past the end.
void mix_pairs(const uint8_t *row, const std::vector<Pair> &pairs, int16_t *out) {
    for (const Pair &one : pairs) {
        const uint8_t *pixel = row + 3 * one.first;
#if defined(__SSE2__)
        int32_t low, high, weights = static_cast<uint16_t>(one.near_) | static_cast<int32_t>(one.far_) << 16;
        std::memcpy(&low, pixel, 4);
        std::memcpy(&high, pixel + 3, 4);
        const __m128i both = _mm_unpacklo_epi8(_mm_cvtsi32_si128(low), _mm_cvtsi32_si128(high));
        const __m128i words = _mm_unpacklo_epi8(both, _mm_setzero_si128());
        const __m128i sums = _mm_srai_epi32(_mm_madd_epi16(words, _mm_set1_epi32(weights)), 4);
        _mm_storel_epi64(reinterpret_cast<__m128i *>(out), _mm_packs_epi32(sums, sums));
#else
        for (int32_t channel = 0; channel < 3; ++channel)
            out[channel] = static_cast<int16_t>((one.near_ * pixel[channel] + one.far_ * pixel[channel + 3]) >> 4);
#endif
        out += 3;
    }
}

BEST_CODE void mix_rows(const int16_t *upper, const int16_t *lower, Pair weights, int32_t count, uint8_t *out) {
    const int16_t near_ = weights.near_, far_ = weights.far_;
    for (int32_t place = 0; place < count; ++place) {
        const int16_t sum = static_cast<int16_t>(
            static_cast<int16_t>((near_ * upper[place]) >> 16) + static_cast<int16_t>((far_ * lower[place]) >> 16));
        out[place] = static_cast<uint8_t>(std::clamp((sum + 2) >> 2, 0, 255));
    }
}

void bilinear(
    const Image &from, uint8_t *out, int32_t height, int32_t width, double down, double across, bool mirror,
    bool areas) {
    thread_local std::vector<Pair> pairs;
    thread_local std::vector<uint8_t> row;
    thread_local std::vector<int16_t> mixed[2];
    const int32_t values = 3 * width;
    pairs.resize(width);
    for (int32_t place = 0; place < width; ++place)
        pairs[mirror ? width - 1 - place : place] =
            within(pair(place, across, static_cast<double>(width) / from.width, areas), from.width);
    row.resize(3 * from.width + kSlack);
    mixed[0].resize(values + kSlack);
    mixed[1].resize(values + kSlack);
    int32_t there[2] = {-1, -1};  // source rows in `mixed`
    const auto mixed_row = [&](int32_t line, int32_t keep) {
        line = std::clamp(line, 0, from.height - 1);
        if (there[0] == line || there[1] == line) return there[0] == line ? 0 : 1;
        const int32_t slot = keep == 0 ? 1 : 0;
        std::memcpy(row.data(), from.pixels + line * from.stride, 3 * static_cast<size_t>(from.width));
        mix_pairs(row.data(), pairs, mixed[slot].data());
        there[slot] = line;
        return slot;
    };
    for (int32_t line = 0; line < height; ++line) {
        const Pair rows = pair(line, down, static_cast<double>(height) / from.height, areas);
        // The upper row may be the lower one of the line before: the slot that is needed less is the other.
        const int32_t upper = mixed_row(rows.first, there[0] > there[1] ? 0 : 1);
        const int32_t lower = mixed_row(rows.first + 1, upper);
        mix_rows(mixed[upper].data(), mixed[lower].data(), rows, values, out + static_cast<int64_t>(line) * values);
    }
}

bool whole(double scale) { return std::abs(scale - std::lrint(scale)) < 2.220446049250313e-16; }

}  // namespace

// Resize the box (y, x, h, w) of an RGB image of rows x columns pixels to height x width, left to right when mirrored.
//   filter  0: by areas as OpenCV's INTER_AREA; 1: bilinear as its INTER_LINEAR (two pixels a side, no antialiasing)
// Returns 0, or 1 for what is left to OpenCV itself (both sides shrink by whole factors), 3 for a box that cannot be.
extern "C" int32_t sieve_resize(
    const uint8_t *pixels, int64_t rows, int64_t columns, int64_t y, int64_t x, int64_t h, int64_t w, uint8_t *out,
    int64_t height, int64_t width, int64_t filter, int64_t mirror) {
    if (y < 0 || x < 0 || h < 1 || w < 1 || y > rows - h || x > columns - w) return 3;
    if (height < 1 || width < 1 || rows > 65535 || columns > 65535 || height > 65535 || width > 65535) return 3;
    const Image from{pixels + 3 * (y * columns + x), 3 * columns, static_cast<int32_t>(h), static_cast<int32_t>(w)};
    const double down = 1.0 / (static_cast<double>(height) / h), across = 1.0 / (static_cast<double>(width) / w);
    const auto high = static_cast<int32_t>(height), wide = static_cast<int32_t>(width);
    // OpenCV takes areas for bilinear reduction by exactly two, too.
    const bool whole_both = down >= 1 && across >= 1 && whole(down) && whole(across);
    if (whole_both && (filter == 0 || (h == 2 * height && w == 2 * width))) return 1;
    if (filter == 0 && down >= 1 && across >= 1)
        by_areas(from, out, high, wide, down, across, mirror != 0);
    else
        bilinear(from, out, high, wide, down, across, mirror != 0, filter == 0);
    return 0;
}
