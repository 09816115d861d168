// The outcome of a kernel entry. Kernels never throw: the torch layer turns a status into an error.
// kInvalidArgument means that the caller broke the contract of the args struct (a bug in the
// caller, since user arguments are checked before); kDeviceError carries the device runtime's code
// and text. kNoRoom is a kDeviceError before anything ran: the device, or the part of it that this
// process may use, cannot run the blocks of a team together; a plan without teams can run.
#pragma once

namespace normcore::kernels {

enum class StatusCode : unsigned char { kOk, kInvalidArgument, kDeviceError, kNoRoom };

struct [[nodiscard]] Status {
  StatusCode code = StatusCode::kOk;
  int device_code = 0;       // cudaError_t of a kDeviceError or kNoRoom
  const char* message = "";  // static storage: names the violated rule, or the device's own text

  bool ok() const { return code == StatusCode::kOk; }

  static constexpr Status success() { return {}; }
  static constexpr Status invalid(const char* rule) {
    return {StatusCode::kInvalidArgument, 0, rule};
  }
};

}  // namespace normcore::kernels
