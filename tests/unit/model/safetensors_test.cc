// The attack list: each broken file is rejected with a message that names the file, the tensor and the numbers.
#include "lib/model/safetensors.h"

#include <sys/stat.h>

#include "lib/base/error.h"
#include "tests/catch.h"
#include "tests/unit/model/files.h"

namespace moebius::test {
namespace {

using Catch::Contains;

std::unique_ptr<ModelFile> open_file(const std::filesystem::path& path) { return FolderFiles(path.parent_path()).open(path.filename()); }

// Opens a file with these bytes; the message of the refusal ("" when it is accepted).
std::string refusal(const std::string& bytes) {
  const TempFolder folder;
  const auto path = folder / "attacked.safetensors";
  write_file(path, bytes);
  try {
    SafetensorsFile file(open_file(path));
    return "";
  } catch (const Error& e) {
    CHECK_THAT(e.what(), Contains("attacked.safetensors"));
    return e.what();
  }
}

std::string refusal_of_header(const std::string& header, size_t data_bytes) { return refusal(safetensors(header, data_bytes)); }

std::string with_length(uint64_t n, size_t rest) {
  std::string out(8, '\0');
  std::memcpy(out.data(), &n, 8);
  return out + std::string(rest, ' ');
}

}  // namespace

TEST_CASE("a good file is read, with whitespace around the header, empty tensors, scalars and metadata") {
  const TempFolder folder;
  write_file(folder / "good.safetensors",
             safetensors(" \n{\"__metadata__\":{\"format\":\"pt\"}," + entry("a", "BF16", "2,3", "0,12") + "," + entry("empty", "F32", "0,7", "12,12") + "," +
                             entry("scalar", "F32", "", "12,16") + "}   ",
                         16));
  const SafetensorsFile file(open_file(folder / "good.safetensors"));
  REQUIRE(file.tensors().size() == 3);
  CHECK(file.tensors().at("a").shape == std::vector<int64_t>{2, 3});
  CHECK(file.tensors().at("a").dtype == Dtype::kBf16);
  CHECK(file.tensors().at("empty").begin == file.tensors().at("empty").end);
}

TEST_CASE("1: impossible header lengths") {
  CHECK_THAT(refusal("1234567"), Contains("7 bytes"));
  CHECK_THAT(refusal(with_length(0, 20)), Contains("header length 0"));
  CHECK_THAT(refusal(with_length(21, 20)), Contains("header length 21"));
  CHECK_THAT(refusal(with_length(100000001, 20)), Contains("100000001"));
  for (uint64_t n : {UINT64_MAX, UINT64_MAX - 4, UINT64_MAX - 7}) CHECK_THAT(refusal(with_length(n, 20)), Contains(std::to_string(n)));
}

TEST_CASE("2: headers that are no JSON object, or nested, or followed by something") {
  CHECK_THAT(refusal_of_header("{" + entry("a", "U8", "1", "0,1") + "}" + std::string(1, '\0') + "{}", 1), Contains("JSON"));
  CHECK_THAT(refusal_of_header("", 0), Contains("header length 0"));
  CHECK_THAT(refusal_of_header("[]", 0), Contains("no JSON object"));
  CHECK_THAT(refusal_of_header("{", 0), Contains("JSON"));
  CHECK_THAT(refusal_of_header("{} x", 0), Contains("JSON"));
  CHECK_THAT(refusal_of_header("{\"a\xff\":1}", 0), Contains("JSON"));
  CHECK_THAT(refusal_of_header("{\"a\":" + std::string(1000, '[') + std::string(1000, ']') + "}", 0), Contains("'a'"));
  CHECK_THAT(refusal_of_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[[1]],\"data_offsets\":[0,4]}}", 4), Contains("'a'"));
  CHECK_THAT(refusal_of_header("{\"a\":{\"dtype\":{\"x\":1}}}", 4), Contains("'a'"));
}

TEST_CASE("3: offsets that are no two ascending 64-bit integers") {
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "1", "4,0") + "}", 4), Contains("'a'") && Contains("[4, 0]"));
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "1", "-1,3") + "}", 4), Contains("'a'") && Contains("-1"));
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "1", "0,4.0") + "}", 4), Contains("'a'") && Contains("4.0"));
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "1", "0,\"4\"") + "}", 4), Contains("'a'"));
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "1", "0,18446744073709551616") + "}", 4), Contains("18446744073709551616"));
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "1", "0,4,8") + "}", 4), Contains("3 numbers"));
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "1", "0") + "}", 4), Contains("1 numbers"));
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "-1", "0,4") + "}", 4), Contains("-1"));
}

TEST_CASE("4: ends past the file") {
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "2", "0,8") + "}", 4), Contains("'a'") && Contains("8") && Contains("4"));
  CHECK_THAT(refusal_of_header("{" + entry("a", "U8", "18446744073709551615", "0,18446744073709551615") + "}", 4), Contains("'a'"));
  // 2^64 − 16 and 2^64 − 8: the size between them is right, and adding the start of the data would wrap.
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "2", "18446744073709551600,18446744073709551608") + "}", 8),
             Contains("'a'") && Contains("18446744073709551608") && Contains("holds 8"));
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "2", "9223372036854775800,9223372036854775808") + "}", 8), Contains("'a'") && Contains("9223372036854775808"));
}

TEST_CASE("5: shapes whose product overflows, to a small number or to 0") {
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "4294967296,4294967296", "0,0") + "}", 0), Contains("'a'") && Contains("64 bits"));
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "4611686018427387905,4", "0,16") + "}", 16), Contains("'a'"));
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "9223372036854775808", "0,0") + "}", 0), Contains("'a'"));
}

TEST_CASE("6: shape and offsets that disagree") {
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "3", "0,8") + "}", 8), Contains("'a'") && Contains("12 bytes") && Contains("make 8"));
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "0", "0,8") + "}", 8), Contains("0 bytes"));
}

TEST_CASE("7: tensors that overlap") {
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "2", "0,8") + "," + entry("b", "F32", "1", "4,8") + "}", 8), Contains("'b'") && Contains("overlap"));
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "2", "0,8") + "," + entry("b", "F32", "2", "0,8") + "}", 8), Contains("overlap"));
  CHECK_THAT(refusal_of_header("{" + entry(std::string(5000, 'n'), "F32", "2", "0,8") + "}", 8), Contains("5000 bytes"));
}

TEST_CASE("7: a hundred thousand tensors on one range, and more tensors than are read") {
  std::string header = "{" + entry("t0", "F32", "256", "0,1024");
  for (int i = 1; i < 100000; ++i) header += "," + entry("t" + std::to_string(i), "F32", "256", "0,1024");
  CHECK_THAT(refusal_of_header(header + "}", 1024), Contains("overlap") && Contains("begins at byte 0") && Contains("ends at 1024"));
  if (kSanitized) return;  // a minute
  // Of no bytes they are no overlap; their number is bounded all the same.
  header = "{" + entry("t0", "U8", "0", "0,0");
  for (int i = 1; i <= 1000000; ++i) header += "," + entry("t" + std::to_string(i), "U8", "0", "0,0");
  CHECK_THAT(refusal_of_header(header + "}", 0), Contains("more than 1000000 tensors"));
}

TEST_CASE("8: holes and trailing bytes") {
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "1", "4,8") + "}", 8), Contains("'a'") && Contains("hole"));
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "1", "0,4") + "}", 9), Contains("end at byte 4") && Contains("9"));
}

TEST_CASE("9: names and fields given twice, metadata that is no text") {
  CHECK_THAT(refusal_of_header("{" + entry("a", "F32", "1", "0,4") + "," + entry("a", "F32", "1", "0,4") + "}", 4), Contains("'a' is defined twice"));
  CHECK_THAT(refusal_of_header("{\"__metadata__\":{},\"__metadata__\":{}}", 0), Contains("twice"));
  CHECK_THAT(refusal_of_header("{\"__metadata__\":{\"a\":1}}", 0), Contains("__metadata__"));
  CHECK_THAT(refusal_of_header("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4), Contains("dtype is given twice"));
  CHECK_THAT(refusal_of_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"more\":[]}}", 4), Contains("'more'"));
  CHECK_THAT(refusal_of_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4), Contains("'a' lacks"));
}

TEST_CASE("10: dtypes that are not known or not whole bytes") {
  CHECK_THAT(refusal_of_header("{" + entry("a", "F12", "1", "0,4") + "}", 4), Contains("'F12'"));
  CHECK_THAT(refusal_of_header("{" + entry("a", "F4", "3", "0,2") + "}", 2), Contains("12 bits"));
}

TEST_CASE("13: a truncated file") {
  const std::string whole = safetensors("{" + entry("a", "F32", "4", "0,16") + "}", 16);
  for (size_t n = 0; n < whole.size(); ++n) CHECK(refusal(whole.substr(0, n)) != "");
  CHECK(refusal(whole) == "");
}

TEST_CASE("13: a file that shrinks after it was opened is an error with the file, the tensor and the place") {
  const TempFolder folder;
  write_file(folder / "a", safetensors("{" + entry("a", "F32", "4", "0,16") + "," + entry("b", "F32", "4", "16,32") + "}", 32));
  const SafetensorsFile file(open_file(folder / "a"));
  char bytes[16];
  CHECK_NOTHROW(file.read("b", file.tensors().at("b"), 0, bytes, 16));
  const uint64_t size = std::filesystem::file_size(folder / "a");
  std::filesystem::resize_file(folder / "a", size - 4);
  CHECK_NOTHROW(file.read("a", file.tensors().at("a"), 0, bytes, 16));
  CHECK_THROWS_WITH(file.read("b", file.tensors().at("b"), 8, bytes, 8),
                    Contains("/a: ends at byte " + std::to_string(size - 4)) && Contains("tensor 'b'") && Contains("from byte 8 of its 16"));
}

TEST_CASE("14: what stands for model.safetensors and is no regular file is refused and not waited for") {
  const auto refusal_of_single = [](auto&& prepare) {
    const TempFolder folder;
    prepare(folder / "model.safetensors");
    try {
      Checkpoint c(folder.path());
      return std::string();
    } catch (const Error& e) {
      return std::string(e.what());
    }
  };
  CHECK_THAT(refusal_of_single([](const auto& path) { mkfifo(path.c_str(), 0600); }), Contains("model.safetensors: is not a regular file"));
  for (const char* device : {"/dev/zero", "/dev/null", "/proc/self"})
    CHECK_THAT(refusal_of_single([&](const auto& path) { std::filesystem::create_symlink(device, path); }), Contains("not a regular file"));
  CHECK_THAT(refusal_of_single([](const auto& path) { std::filesystem::create_directory(path); }), Contains("not a regular file"));
  const TempFolder index;
  mkfifo((index / "model.safetensors.index.json").c_str(), 0600);
  CHECK_THROWS_WITH(Checkpoint(index.path()), Contains("index.json: is not a regular file"));
}

TEST_CASE("14: indices that lead out of the folder, and shards that are no regular files") {
  const auto index_refusal = [](const std::string& shard, auto&& prepare) {
    const TempFolder folder;
    write_file(folder / "model.safetensors.index.json", "{\"weight_map\":{\"a\":\"" + shard + "\"}}");
    prepare(folder);
    try {
      Checkpoint c(folder.path());
      return std::string();
    } catch (const Error& e) {
      return std::string(e.what());
    }
  };
  const auto nothing = [](const TempFolder&) {};
  for (const char* bad : {"../x.safetensors", "/etc/passwd", "sub/x", "", ".", ".."})
    CHECK_THAT(index_refusal(bad, nothing), Contains("no plain file name"));
  for (const char* bad : {"x\\u0000.safetensors", "\\u0000", "../x\\u0000"})  // NUL, as JSON spells it
    CHECK_THAT(index_refusal(bad, nothing), Contains("\\0") && Contains("no plain file name"));
  CHECK_THAT(index_refusal("x.safetensors", nothing), Contains("x.safetensors"));
  CHECK_THAT(index_refusal("fifo", [](const TempFolder& f) { mkfifo((f / "fifo").c_str(), 0600); }), Contains("not a regular file"));
  CHECK_THAT(index_refusal("loop", [](const TempFolder& f) { std::filesystem::create_symlink(f / "loop", f / "loop"); }), Contains("loop"));
  CHECK_THAT(index_refusal("b.safetensors", [](const TempFolder& f) {
               write_file(f / "b.safetensors", safetensors("{" + entry("b", "F32", "1", "0,4") + "}", 4));
             }),
             Contains("'a' is not in its file"));
}

TEST_CASE("9: an index that names a tensor twice") {
  const TempFolder folder;
  write_file(folder / "x.safetensors", safetensors("{" + entry("a", "F32", "1", "0,4") + "}", 4));
  write_file(folder / "model.safetensors.index.json", R"({"weight_map":{"a":"x.safetensors","a":"x.safetensors"}})");
  CHECK_THROWS_WITH(Checkpoint(folder.path()), Contains("index.json") && Contains("'a' is given twice"));
}

TEST_CASE("several shards are one checkpoint, and a folder without any says so") {
  const TempFolder folder;
  write_file(folder / "x.safetensors", safetensors("{" + entry("a", "F32", "1", "0,4") + "}", 4));
  write_file(folder / "y.safetensors", safetensors("{" + entry("b", "F32", "1", "0,4") + "}", 4));
  write_file(folder / "model.safetensors.index.json", R"({"weight_map":{"a":"x.safetensors","b":"y.safetensors"}})");
  const Checkpoint c(folder.path());
  CHECK(c.find("a") != nullptr);
  CHECK(c.find("b") != nullptr);
  CHECK(c.find("c") == nullptr);
  const TempFolder empty;
  CHECK_THROWS_WITH(Checkpoint(empty.path()), Contains("neither"));
}

}  // namespace moebius::test
