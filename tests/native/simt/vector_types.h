// CUDA's built-in vector types, with its alignments: a load through a misaligned pointer is reported.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define FR_VECTOR2(name, type)            \
  struct alignas(2 * sizeof(type)) name { \
    type x, y;                            \
  };                                      \
  inline name make_##name(type x, type y) { return {x, y}; }

#define FR_VECTOR4(name, type, alignment) \
  struct alignas(alignment) name {        \
    type x, y, z, w;                      \
  };                                      \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

FR_VECTOR2(uchar2, unsigned char)
FR_VECTOR2(ushort2, unsigned short)
FR_VECTOR2(int2, int)
FR_VECTOR2(uint2, unsigned)
FR_VECTOR2(longlong2, long long)
FR_VECTOR2(ulonglong2, unsigned long long)
FR_VECTOR2(float2, float)
FR_VECTOR2(double2, double)
FR_VECTOR4(uchar4, unsigned char, 4)
FR_VECTOR4(ushort4, unsigned short, 8)
FR_VECTOR4(int4, int, 16)
FR_VECTOR4(uint4, unsigned, 16)
FR_VECTOR4(float4, float, 16)
FR_VECTOR4(double4, double, 16)

#undef FR_VECTOR2
#undef FR_VECTOR4
