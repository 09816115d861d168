#include <gtest/gtest.h>
#include <normcore/normcore.h>
#include <torch/torch.h>

namespace normcore::testing {
namespace {

const auto kMeta = at::device(at::kMeta).dtype(at::kBFloat16);

TEST(Explain, NamesOperatorPassDeviceAndLayout) {
  const auto x = at::empty({32, 256, 56, 56}, kMeta);
  const auto text = explain(x, "group_norm", ExplainOptions().device(at::kCUDA).backward(true));
  EXPECT_EQ(text.find("group_norm backward on cuda, bfloat16 [32, 256, 56, 56] as n=32 c=256 "
                      "s=3136 planes: cluster path"),
            0u)
      << text;
}

TEST(Explain, TakesTheOptionsOfTheOperator) {
  const auto x = at::empty({4, 10, 12, 6}, kMeta);
  const auto options = ExplainOptions().device(at::kCPU).axis({1, 3}).num_groups(4);
  EXPECT_NE(explain(x, "group_norm", options).find("copied to n=4 c=60 s=12 planes"),
            std::string::npos);
  EXPECT_THROW(explain(x, "group_norm", ExplainOptions(options).num_groups(7)), c10::ValueError);
  EXPECT_THROW(explain(x, "layer_norm", options), c10::ValueError);
  EXPECT_THROW(explain(x, "batch_norm", ExplainOptions().device(at::kCPU).axis(4)),
               c10::IndexError);
  EXPECT_THROW(explain(x, "batch_norm"), c10::NotImplementedError);  // nothing runs on Meta
}

// Batch norm with running statistics ignores a mask; group norm has no other statistics to take.
TEST(Explain, KnowsWhereAMaskCounts) {
  const auto x = at::empty({2, 48, 10, 10}, kMeta).contiguous(at::MemoryFormat::ChannelsLast);
  const auto mask = at::ones({2, 1, 10, 10}, at::device(at::kMeta).dtype(at::kBool));
  const auto options = ExplainOptions().device(at::kCPU).num_groups(4).training(false);
  const auto masked = ExplainOptions(options).mask(mask);
  EXPECT_NE(explain(x, "group_norm", masked), explain(x, "group_norm", options));
  EXPECT_EQ(explain(x, "batch_norm", masked), explain(x, "batch_norm", options));
}

}  // namespace
}  // namespace normcore::testing
