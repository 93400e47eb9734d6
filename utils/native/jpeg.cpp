// Decoding a part of a JPEG: only its rows and columns, at full, half or quarter size. libjpeg-turbo's C interface.
//
// Entropy decoding goes from the image's first row to the part's last; the inverse transform, upsampling and colour
// conversion are done for the part alone, widened to whole blocks and by what chroma upsampling reads around it, so
// that its pixels are those of the whole image's decoding, bit for bit.

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdio>

#include <jpeglib.h>

namespace {

// Pixels around the part that its own depend on: fancy upsampling of halved chroma reads one chroma sample further.
constexpr int64_t kMargin = 2;

constexpr int kRowsAtATime = 16;

struct Errors {
    jpeg_error_mgr base;
    std::jmp_buf back;
};

[[noreturn]] void stop(j_common_ptr info) { std::longjmp(reinterpret_cast<Errors *>(info->err)->back, 1); }

// Level -1 is a warning: data that libjpeg would patch up by guessing. Higher levels are traces.
void message(j_common_ptr info, int level) {
    if (level < 0) stop(info);
}

void say_nothing(j_common_ptr) {}

// One decompressor a thread, made at its first image.
class Decompressor {
  public:
    jpeg_decompress_struct info{};
    Errors errors{};
    bool made = false;

    ~Decompressor() {
        if (made) jpeg_destroy_decompress(&info);
    }
};

thread_local Decompressor decompressor;

// The part along one axis of the scaled image: [first, last), and [from, to) with its margin.
struct Span {
    int64_t first, last, from, to;
};

Span span(int64_t start, int64_t length, int64_t scale, int64_t size) {
    const int64_t first = std::min((start + scale / 2) / scale, size - 1);
    const int64_t last = std::min(std::max((start + length + scale / 2) / scale, first + 1), size);
    return {first, last, std::max<int64_t>(first - kMargin, 0), std::min(last + kMargin, size)};
}

struct Box {
    int64_t y, x, h, w;
};

// What `sieve_decode` does once an error has a place to jump to. Nothing here has a destructor: a jump leaks nothing.
int32_t decode(
    const uint8_t *data, int64_t bytes, int64_t height, int64_t width, const Box &box, int64_t scale, bool exact,
    uint8_t *out, int64_t capacity, int64_t *placed) {
    Decompressor &own = decompressor;
    jpeg_decompress_struct &info = own.info;
    if (!own.made) {
        info.err = jpeg_std_error(&own.errors.base);
        own.errors.base.error_exit = stop;
        own.errors.base.emit_message = message;
        own.errors.base.output_message = say_nothing;
        jpeg_create_decompress(&info);
        own.made = true;
    }
    jpeg_mem_src(&info, const_cast<uint8_t *>(data), static_cast<unsigned long>(bytes));
    jpeg_read_header(&info, TRUE);
    if (info.image_width != width || info.image_height != height) {
        jpeg_abort_decompress(&info);
        return 2;
    }
    info.out_color_space = JCS_RGB;
    info.dct_method = exact ? JDCT_ISLOW : JDCT_IFAST;
    info.scale_num = 1;
    info.scale_denom = static_cast<unsigned>(scale);
    jpeg_start_decompress(&info);

    const Span rows = span(box.y, box.h, scale, info.output_height), columns = span(box.x, box.w, scale, info.output_width);
    JDIMENSION left = static_cast<JDIMENSION>(columns.from);
    if (columns.from > 0 || columns.to < info.output_width) {
        JDIMENSION wide = static_cast<JDIMENSION>(columns.to - columns.from);
        jpeg_crop_scanline(&info, &left, &wide);  // moves `left` to the start of a block
    }
    const int64_t stride = 3 * static_cast<int64_t>(info.output_width);
    const int64_t count = rows.last - rows.from;
    if (info.output_components != 3 || count * stride > capacity) {
        jpeg_abort_decompress(&info);
        return 1;
    }
    if (rows.from > 0) jpeg_skip_scanlines(&info, static_cast<JDIMENSION>(rows.from));
    for (int64_t row = 0; row < count;) {
        JSAMPROW lines[kRowsAtATime];
        const int64_t wanted = std::min<int64_t>(kRowsAtATime, count - row);
        for (int64_t line = 0; line < wanted; ++line) lines[line] = out + (row + line) * stride;
        const JDIMENSION got = jpeg_read_scanlines(&info, lines, static_cast<JDIMENSION>(wanted));
        if (got == 0) stop(reinterpret_cast<j_common_ptr>(&info));
        row += got;
    }
    placed[0] = count;
    placed[1] = info.output_width;
    placed[2] = rows.first - rows.from;
    placed[3] = columns.first - left;
    placed[4] = rows.last - rows.first;
    placed[5] = columns.last - columns.first;
    jpeg_abort_decompress(&info);
    return 0;
}

}  // namespace

// Decode the box (y, x, h, w) of a JPEG of height x width pixels to RGB bytes in `out`, whose size is `capacity`.
//   scale   1, 2 or 4: the image is decoded at this fraction of its size; the box is rounded to whole pixels of that
//   exact   1: the exact inverse transform; 0: the fast one, FFCV's
//   placed  [6], written: rows and columns of what lies in `out`, and the box in it (y, x, h, w)
// Returns 0, or 1 for data that is damaged, 2 for an image of another size, 3 for a box or scale that cannot be.
// Reads no byte outside `data`, writes none outside `out`, whatever the data says.
extern "C" int32_t sieve_decode(
    const uint8_t *data, int64_t bytes, int64_t height, int64_t width, int64_t y, int64_t x, int64_t h, int64_t w,
    int64_t scale, int64_t exact, uint8_t *out, int64_t capacity, int64_t *placed) {
    if (y < 0 || x < 0 || h < 1 || w < 1 || y > height - h || x > width - w) return 3;
    if (scale != 1 && scale != 2 && scale != 4) return 3;
    if (bytes < 1) return 1;
    if (setjmp(decompressor.errors.back)) {
        if (decompressor.made) jpeg_abort_decompress(&decompressor.info);
        return 1;
    }
    return decode(data, bytes, height, width, {y, x, h, w}, scale, exact != 0, out, capacity, placed);
}
