/* The arithmetic of _kernels_impl.h, compiled for each instruction set, and the choice between them.
 *
 * Two are compiled on x86 (generic, and AVX2 with FMA), one elsewhere; the best that the processor has is chosen at
 * import. All processes of one host choose the same, so their bits agree.
 */
#include "_kernels.h"
#include "_quantise_row.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAVE_AVX2_BUILD 1
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define LANES 8
#define X_TILE_FLOATS 65536 /* rows of x per pass over w: 256 KiB stay in the second-level cache */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 12")

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i8x32 __attribute__((vector_size(32)));
typedef uint32_t u8x32 __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16)));
typedef uint8_t b8 __attribute__((vector_size(8)));

#define PAIRS_EVEN 0, 2, 8, 10, 4, 6, 12, 14
#define PAIRS_ODD 1, 3, 9, 11, 5, 7, 13, 15
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i8x32){__VA_ARGS__})
#endif

#if defined(__aarch64__)
INLINE v8 vfma_neon(v8 a, v8 b, v8 c)
{
    float32x4_t x[2], y[2], z[2];
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    memcpy(z, &c, sizeof z);
    z[0] = vfmaq_f32(z[0], x[0], y[0]);
    z[1] = vfmaq_f32(z[1], x[1], y[1]);
    memcpy(&c, z, sizeof c);
    return c;
}
#define VFMA(a, b, c) vfma_neon(a, b, c)
#else
#define VFMA(a, b, c) ((a) * (b) + (c))
#endif
#define WIDEN_U16(h) __builtin_convertvector(h, u8x32)
#define WIDEN_U8(b) __builtin_convertvector(b, u8x32)
#define FN(name) name##_generic
#include "_kernels_impl.h"
#undef FN
#undef VFMA
#undef WIDEN_U16
#undef WIDEN_U8

#ifdef HAVE_AVX2_BUILD
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define VFMA(a, b, c) ((v8)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define WIDEN_U16(h) ((u8x32)_mm256_cvtepu16_epi32((__m128i)(h)))
#define WIDEN_U8(b) ((u8x32)_mm256_cvtepu8_epi32(_mm_set_epi64x(0, (long long)(b))))
#define WIDEN_F16(h) ((v8)_mm256_cvtph_ps((__m128i)(h)))
#define FN(name) name##_avx2
#include "_kernels_impl.h"
#undef WIDEN_U16
#undef WIDEN_U8
#undef WIDEN_F16
#undef FN
#undef VFMA
#pragma GCC pop_options
#endif

const kernel_set *kernels = &kernel_set_generic;

#ifdef HAVE_AVX2_BUILD
static int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

const char *kernels_name(void)
{
    return kernels == &kernel_set_generic ? "generic" : "avx2";
}

/* Use the instruction set `name`; 0 if it was not compiled or the processor lacks it. */
int kernels_select(const char *name)
{
    const kernel_set *wanted = strcmp(name, "generic") == 0 ? &kernel_set_generic : NULL;
#ifdef HAVE_AVX2_BUILD
    if (strcmp(name, "avx2") == 0 && has_avx2())
        wanted = &kernel_set_avx2;
#endif
    kernels = wanted != NULL ? wanted : kernels;
    return wanted != NULL;
}

void kernels_select_best(void)
{
    if (!kernels_select("avx2"))
        (void)kernels_select("generic");
}
