// Groups: 8 neighbouring elements of a row, the unit of every load and store. With kVector a group is whole and 16-byte
// aligned and moves in 16-byte accesses; without, its first `count` elements move one by one.
#pragma once

#include "device/storage.cuh"

namespace fused_resnet::cuda {

inline constexpr int kGroup = 8;

// As it lies in memory, in registers.
template <class T>
struct Group {
  static constexpr int kWords = kGroup * static_cast<int>(sizeof(T)) / 4;
  uint32_t word[kWords];

  FR_DEVICE Stat<T> operator[](int j) const {
    if constexpr (sizeof(T) == 8) {
      return bit_copy<double>(static_cast<uint64_t>(word[2 * j + 1]) << 32 | word[2 * j]);
    } else if constexpr (sizeof(T) == 4) {
      return bit_copy<float>(word[j]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      return bit_copy<float>(j % 2 == 0 ? word[j / 2] << 16 : word[j / 2] & 0xffff0000u);
    } else {
      return to_stat(T{static_cast<uint16_t>(word[j / 2] >> (16 * (j % 2)))});
    }
  }
};

template <class T>
FR_DEVICE Group<T> empty_group() {
  Group<T> g;
  FR_UNROLL
  for (int i = 0; i < Group<T>::kWords; ++i) g.word[i] = 0;
  return g;
}

// Into an element that is still 0.
template <class T>
FR_DEVICE void put_element(Group<T>& g, int j, T value) {
  if constexpr (sizeof(T) == 8) {
    const uint64_t bits = bit_copy<uint64_t>(value);
    g.word[2 * j] = static_cast<uint32_t>(bits);
    g.word[2 * j + 1] = static_cast<uint32_t>(bits >> 32);
  } else if constexpr (sizeof(T) == 4) {
    g.word[j] = bit_copy<uint32_t>(value);
  } else {
    g.word[j / 2] |= static_cast<uint32_t>(value.bits) << (16 * (j % 2));
  }
}

template <bool kVector, class T>
FR_DEVICE Group<T> load_group(const T* p, int count) {
  Group<T> g = empty_group<T>();
  if constexpr (kVector) {
    FR_UNROLL
    for (int i = 0; i < Group<T>::kWords / 4; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(p)[i];
      g.word[4 * i] = v.x;
      g.word[4 * i + 1] = v.y;
      g.word[4 * i + 2] = v.z;
      g.word[4 * i + 3] = v.w;
    }
  } else {
    FR_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      if (j < count) put_element(g, j, p[j]);
    }
  }
  return g;
}

// One 16-byte store. The compiler would split a plain assignment into four, of words that need not wait for each other.
FR_DEVICE void store_vector(uint4* p, const uint4& v) {
#ifdef FR_SIMT
  *p = v;
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

template <bool kVector, class T>
FR_DEVICE void store_group(T* p, const Stat<T> (&v)[kGroup], int count) {
  if constexpr (kVector) {
    uint32_t word[Group<T>::kWords];
    FR_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      if constexpr (sizeof(T) == 8) {
        const uint64_t bits = bit_copy<uint64_t>(v[j]);
        word[2 * j] = static_cast<uint32_t>(bits);
        word[2 * j + 1] = static_cast<uint32_t>(bits >> 32);
      } else if constexpr (sizeof(T) == 4) {
        word[j] = bit_copy<uint32_t>(v[j]);
      } else if (j % 2 == 0) {
        word[j / 2] = pack_two<T>(v[j], v[j + 1]);
      }
    }
    FR_UNROLL
    for (int i = 0; i < Group<T>::kWords / 4; ++i) {
      uint4 packed;
      packed.x = word[4 * i];
      packed.y = word[4 * i + 1];
      packed.z = word[4 * i + 2];
      packed.w = word[4 * i + 3];
      store_vector(reinterpret_cast<uint4*>(p) + i, packed);
    }
  } else {
    FR_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      if (j < count) p[j] = from_stat<T>(v[j]);
    }
  }
}

// Eight bytes, the first one lowest. kVector asks for 8-byte alignment. Missing ones are `absent`.
template <bool kVector>
FR_DEVICE uint64_t load_bytes(const uint8_t* p, int count, uint8_t absent) {
  if constexpr (kVector) {
    return *reinterpret_cast<const uint64_t*>(p);
  } else {
    uint64_t bytes = 0;
    FR_UNROLL
    for (int j = 0; j < kGroup; ++j) bytes |= static_cast<uint64_t>(j < count ? p[j] : absent) << (8 * j);
    return bytes;
  }
}

template <bool kVector>
FR_DEVICE void store_bytes(uint8_t* p, uint64_t bytes, int count) {
  if constexpr (kVector) {
    *reinterpret_cast<uint64_t*>(p) = bytes;
  } else {
    FR_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      if (j < count) p[j] = static_cast<uint8_t>(bytes >> (8 * j));
    }
  }
}

FR_DEVICE int byte_of(uint64_t bytes, int j) { return static_cast<int>(bytes >> (8 * j) & 0xffu); }

}  // namespace fused_resnet::cuda
