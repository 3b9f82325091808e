// The kernels in a process of their own, for tests: under sanitizers, or for another processor in
// an emulator. It reads calls from its input and answers on its output; tests/cpu_remote.py is the
// other side.
//
// A call: the number of the function; the number of buffers, and for each its address in the other
// process, its size and its bytes; the number of arguments, and for each its size and its bytes.
// Every number has eight bytes. An address in an argument that lies in a buffer is replaced by that
// of the buffer's copy here, which has exactly as many bytes. The answer: what the function
// returned, and the bytes of all buffers.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "additive_attention/csrc/abi.h"
#include "conv_mlp/csrc/abi.h"

using namespace swiftkernels;
using namespace swiftkernels::additive;

EXPORT int64_t swiftkernels_lanes();
EXPORT void swiftkernels_pack(const float*, int64_t, int64_t, int64_t, int64_t, float*);
EXPORT uint64_t swiftkernels_fingerprint(const Fingerprint*, int64_t);
EXPORT int swiftkernels_additive_forward(const PackedWeights*, const Call*);
EXPORT int swiftkernels_additive_forward_training(const RawWeights*, const Call*);
EXPORT int swiftkernels_additive_backward(const RawWeights*, const BackwardCall*);
EXPORT int swiftkernels_conv_mlp_forward(const conv_mlp::PackedWeights*, const conv_mlp::Call*);
EXPORT int swiftkernels_conv_mlp_backward(const conv_mlp::RawWeights*,
                                          const conv_mlp::BackwardCall*);

namespace {

enum Function : int64_t {
  GET_LANES,
  PACK,
  FINGERPRINT,
  FORWARD,
  TRAINING,
  BACKWARD,
  CONV_MLP,
  CONV_MLP_BACKWARD
};

void read_bytes(void* to, size_t count) {
  if (count > 0 && std::fread(to, 1, count, stdin) != count) std::exit(3);
}

void write_bytes(const void* from, size_t count) {
  if (count > 0 && std::fwrite(from, 1, count, stdout) != count) std::exit(3);
}

int64_t read_number() {
  int64_t number;
  read_bytes(&number, sizeof number);
  return number;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Buffer {
  int64_t address, bytes;
  std::unique_ptr<void, Free> copy;
};

/// The words of an argument, with the addresses of this process.
std::vector<int64_t> read_argument(const std::vector<Buffer>& buffers) {
  const int64_t bytes = read_number();
  std::vector<int64_t> words(bytes / 8);
  read_bytes(words.data(), bytes);
  for (int64_t& word : words)
    for (const Buffer& buffer : buffers)
      if (word >= buffer.address && word < buffer.address + buffer.bytes) {
        word += reinterpret_cast<int64_t>(buffer.copy.get()) - buffer.address;
        break;
      }
  return words;
}

template <class T>
const T* as(const std::vector<int64_t>& words) {
  if (sizeof(T) != words.size() * 8) std::exit(4);
  return reinterpret_cast<const T*>(words.data());
}

float* floats(int64_t address) { return reinterpret_cast<float*>(address); }

int64_t call(int64_t function, const std::vector<std::vector<int64_t>>& arguments) {
  switch (function) {
    case GET_LANES:
      return swiftkernels_lanes();
    case PACK: {
      const auto& a = arguments[0];
      swiftkernels_pack(floats(a[0]), a[1], a[2], a[3], a[4], floats(a[5]));
      return 0;
    }
    case FINGERPRINT:
      return static_cast<int64_t>(
          swiftkernels_fingerprint(as<Fingerprint>(arguments[0]), *as<int64_t>(arguments[1])));
    case FORWARD:
      return swiftkernels_additive_forward(as<PackedWeights>(arguments[0]), as<Call>(arguments[1]));
    case TRAINING:
      return swiftkernels_additive_forward_training(as<RawWeights>(arguments[0]),
                                                    as<Call>(arguments[1]));
    case BACKWARD:
      return swiftkernels_additive_backward(as<RawWeights>(arguments[0]),
                                            as<BackwardCall>(arguments[1]));
    case CONV_MLP:
      return swiftkernels_conv_mlp_forward(as<conv_mlp::PackedWeights>(arguments[0]),
                                           as<conv_mlp::Call>(arguments[1]));
    case CONV_MLP_BACKWARD:
      return swiftkernels_conv_mlp_backward(as<conv_mlp::RawWeights>(arguments[0]),
                                            as<conv_mlp::BackwardCall>(arguments[1]));
    default:
      std::exit(4);
  }
}

}  // namespace

int main() {
  int64_t function;
  while (std::fread(&function, sizeof function, 1, stdin) == 1) {
    std::vector<Buffer> buffers(read_number());
    for (Buffer& buffer : buffers) {
      buffer.address = read_number();
      buffer.bytes = read_number();
      buffer.copy.reset(std::malloc(buffer.bytes));
      if (!buffer.copy) std::exit(5);
      read_bytes(buffer.copy.get(), buffer.bytes);
    }
    std::vector<std::vector<int64_t>> arguments(read_number());
    for (auto& argument : arguments) argument = read_argument(buffers);
    const int64_t result = call(function, arguments);
    write_bytes(&result, sizeof result);
    for (const Buffer& buffer : buffers) write_bytes(buffer.copy.get(), buffer.bytes);
    std::fflush(stdout);
  }
  return 0;
}
