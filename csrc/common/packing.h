// The packed form of a linear layer's weight (out_features, in_features), shared by packing code and kernels.
//
// Output features are cut into panels of 16 columns, padded with zeros at the end; the padded reduction dimension K
// runs down a panel in lines of 64 bytes:
//
//   kind   element      per line                    K is padded to a multiple of   bytes of a panel
//   bf16   2 bytes      2 values of k, 16 columns   32                             32 K
//   int8   1 byte       4 values of k, 16 columns   64                             16 K
//
//   data[panel][k / per_line][column][k % per_line]
//
// Sixteen lines are one 1 KB tile of the AMX instructions; a line is one operand of the AVX-512 dot products; a panel
// is read front to back. int8 weights stand for data * scale[out_feature].
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace gear {

constexpr std::int64_t kPanelColumns = 16;
constexpr std::int64_t kLineBytes = 64;
constexpr std::int64_t kTileLines = 16;

// `bytes`: size of an element, 2 for bf16 and 1 for int8.
GEAR_HD constexpr std::int64_t packed_per_line(std::int64_t bytes) { return kLineBytes / kPanelColumns / bytes; }
GEAR_HD constexpr std::int64_t packed_depth(std::int64_t in_features, std::int64_t bytes) {
  const std::int64_t multiple = kTileLines * packed_per_line(bytes);
  return (in_features + multiple - 1) / multiple * multiple;
}
GEAR_HD constexpr std::int64_t packed_panels(std::int64_t out_features) {
  return (out_features + kPanelColumns - 1) / kPanelColumns;
}
GEAR_HD constexpr std::int64_t packed_panel_bytes(std::int64_t in_features, std::int64_t bytes) {
  return packed_depth(in_features, bytes) * kPanelColumns * bytes;
}
// Index of an element in units of elements.
GEAR_HD constexpr std::int64_t packed_index(std::int64_t out_feature, std::int64_t in_feature, std::int64_t in_features,
                                            std::int64_t bytes) {
  const std::int64_t per_line = packed_per_line(bytes);
  return (out_feature / kPanelColumns) * packed_depth(in_features, bytes) * kPanelColumns +
         (in_feature / per_line) * kPanelColumns * per_line + (out_feature % kPanelColumns) * per_line +
         in_feature % per_line;
}

}  // namespace gear
