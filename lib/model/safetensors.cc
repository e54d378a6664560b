#include "lib/model/safetensors.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <optional>
#include <set>

#include <nlohmann/json.hpp>

#include "lib/base/error.h"
#include "lib/base/json_tree.h"
#include "lib/base/numbers.h"

namespace moebius {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the reference implementation's
constexpr size_t kMaxTensors = 1'000'000, kMaxNameBytes = 4096, kMaxRank = 16;

struct DtypeRow {
  const char* name;
  int bits;
  Dtype dtype;
};
constexpr DtypeRow kDtypes[] = {
    {"BOOL", 8, Dtype::kOther},    {"F4", 4, Dtype::kOther},          {"F6_E2M3", 6, Dtype::kOther},     {"F6_E3M2", 6, Dtype::kOther},
    {"U8", 8, Dtype::kOther},      {"I8", 8, Dtype::kOther},          {"F8_E5M2", 8, Dtype::kOther},     {"F8_E4M3", 8, Dtype::kOther},
    {"F8_E8M0", 8, Dtype::kOther}, {"F8_E4M3FNUZ", 8, Dtype::kOther}, {"F8_E5M2FNUZ", 8, Dtype::kOther}, {"I16", 16, Dtype::kOther},
    {"U16", 16, Dtype::kOther},    {"F16", 16, Dtype::kF16},          {"BF16", 16, Dtype::kBf16},        {"I32", 32, Dtype::kOther},
    {"U32", 32, Dtype::kOther},    {"F32", 32, Dtype::kF32},          {"C64", 64, Dtype::kOther},        {"F64", 64, Dtype::kOther},
    {"I64", 64, Dtype::kOther},    {"U64", 64, Dtype::kOther},
};

// Receives the header token by token: duplicates, depth and number types are seen as they come, nothing is built on trust.
// Depth 1: the table of tensors; 2: a tensor's fields, or __metadata__; 3: shape and data_offsets.
class HeaderHandler : public nlohmann::json_sax<json> {
 public:
  HeaderHandler(const std::string& file, std::map<std::string, TensorInfo>& out) : file_(file), out_(out) {}

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_integer(number_integer_t v) override {
    fail(Code::kCorruptModel, "{}: tensor '{}': {} holds the negative number {}", file_, tensor_, field_, v);
  }
  bool number_unsigned(number_unsigned_t v) override {
    if (depth_ != 3 || numbers_ == nullptr) return unexpected("a number");
    if (numbers_->size() >= kMaxRank) fail(Code::kCorruptModel, "{}: tensor '{}': {} has more than {} numbers", file_, tensor_, field_, kMaxRank);
    numbers_->push_back(v);
    return true;
  }
  bool number_float(number_float_t, const string_t& text) override {
    fail(Code::kCorruptModel, "{}: tensor '{}': {} holds {}, which is no integer of 64 bits", file_, tensor_, field_, text);
  }
  bool string(string_t& v) override {
    if (depth_ == 2 && metadata_) return true;
    if (depth_ != 2 || field_ != "dtype") return unexpected("a string");
    dtype_ = v;
    return true;
  }
  bool binary(binary_t&) override { return unexpected("binary"); }
  bool start_object(size_t) override {
    ++depth_;
    if (depth_ == 1) return true;
    if (depth_ != 2) return unexpected("an object");
    metadata_ = tensor_ == "__metadata__";
    seen_.clear();
    dtype_.reset();
    shape_.clear();
    offsets_.clear();
    return true;
  }
  bool key(string_t& k) override {
    if (depth_ == 1) {
      if (k.size() > kMaxNameBytes) fail(Code::kCorruptModel, "{}: a tensor name has {} bytes, at most {} are read", file_, k.size(), kMaxNameBytes);
      if (!names_.insert(k).second) fail(Code::kCorruptModel, "{}: tensor '{}' is defined twice", file_, k);
      if (names_.size() > kMaxTensors) fail(Code::kCorruptModel, "{}: more than {} tensors", file_, kMaxTensors);
      tensor_ = k;
      field_ = "its entry";
      return true;
    }
    if (!seen_.insert(k).second) fail(Code::kCorruptModel, "{}: tensor '{}': {} is given twice", file_, tensor_, k);
    if (!metadata_ && k != "dtype" && k != "shape" && k != "data_offsets")
      fail(Code::kCorruptModel, "{}: tensor '{}': unknown field '{}'", file_, tensor_, k);
    field_ = k;
    return true;
  }
  bool end_object() override {
    if (depth_-- == 2 && !metadata_) finish_tensor();
    return true;
  }
  bool start_array(size_t) override {
    ++depth_;
    if (depth_ != 3 || metadata_ || (field_ != "shape" && field_ != "data_offsets")) return unexpected("an array");
    numbers_ = field_ == "shape" ? &shape_ : &offsets_;
    return true;
  }
  bool end_array() override {
    --depth_;
    numbers_ = nullptr;
    return true;
  }
  bool parse_error(size_t position, const std::string&, const json::exception& e) override {
    fail(Code::kCorruptModel, "{}: the header is not valid JSON at byte {}: {}", file_, position, e.what());
  }
  bool complete() const { return depth_ == 0; }

 private:
  bool unexpected(const char* what) {
    fail(Code::kCorruptModel, "{}: tensor '{}': {} where {} may not stand (nested {} deep)", file_, tensor_, what, field_, depth_);
  }

  void finish_tensor() {
    if (!dtype_ || !seen_.count("shape") || !seen_.count("data_offsets"))
      fail(Code::kCorruptModel, "{}: tensor '{}' lacks dtype, shape or data_offsets", file_, tensor_);
    if (offsets_.size() != 2) fail(Code::kCorruptModel, "{}: tensor '{}': data_offsets has {} numbers, must have 2", file_, tensor_, offsets_.size());
    const auto row = std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const DtypeRow& r) { return *dtype_ == r.name; });
    if (row == std::end(kDtypes)) fail(Code::kCorruptModel, "{}: tensor '{}': dtype '{}' is not known", file_, tensor_, *dtype_);
    TensorInfo info;
    info.dtype = row->dtype;
    info.dtype_name = row->name;
    info.begin = offsets_[0];
    info.end = offsets_[1];
    if (info.begin > info.end)
      fail(Code::kCorruptModel, "{}: tensor '{}': data_offsets [{}, {}] run backwards", file_, tensor_, info.begin, info.end);
    uint64_t bits = static_cast<uint64_t>(row->bits);
    for (uint64_t d : shape_) {  // checked dimension by dimension: an overflow may not hide behind a later 0
      if (d > static_cast<uint64_t>(INT64_MAX) || (d != 0 && !checked_mul(bits, d, &bits)))
        fail(Code::kCorruptModel, "{}: tensor '{}': the product of its shape does not fit 64 bits", file_, tensor_);
      info.shape.push_back(static_cast<int64_t>(d));
    }
    if (std::find(shape_.begin(), shape_.end(), uint64_t{0}) != shape_.end()) bits = 0;
    if (bits % 8 != 0) fail(Code::kCorruptModel, "{}: tensor '{}': {} bits of {} are no whole bytes", file_, tensor_, bits, *dtype_);
    if (bits / 8 != info.end - info.begin)
      fail(Code::kCorruptModel, "{}: tensor '{}': shape and dtype {} make {} bytes, data_offsets [{}, {}] make {}", file_, tensor_, *dtype_,
           bits / 8, info.begin, info.end, info.end - info.begin);
    out_.emplace(tensor_, std::move(info));
  }

  const std::string& file_;
  std::map<std::string, TensorInfo>& out_;
  int depth_ = 0;
  bool metadata_ = false;
  std::string tensor_, field_ = "the top level";
  std::set<std::string> names_, seen_;
  std::optional<std::string> dtype_;
  std::vector<uint64_t> shape_, offsets_;
  std::vector<uint64_t>* numbers_ = nullptr;
};

// The data must be tiled by the tensors exactly: no hole, no overlap, nothing behind.
void require_contiguous(const std::string& file, const std::map<std::string, TensorInfo>& tensors, uint64_t data_bytes) {
  std::vector<std::pair<const std::string*, const TensorInfo*>> order;
  for (const auto& [name, info] : tensors) order.emplace_back(&name, &info);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->begin, a.second->end) < std::pair(b.second->begin, b.second->end);
  });
  uint64_t at = 0;
  for (const auto& [name, info] : order) {
    if (info->end > data_bytes)
      fail(Code::kCorruptModel, "{}: tensor '{}' ends at byte {} of the data, the file holds {}", file, *name, info->end, data_bytes);
    if (info->begin != at)
      fail(Code::kCorruptModel, "{}: tensor '{}' begins at byte {} of the data, the tensor before it ends at {} ({})", file, *name, info->begin,
           at, info->begin < at ? "overlap" : "hole");
    at = info->end;
  }
  if (at != data_bytes) fail(Code::kCorruptModel, "{}: the tensors end at byte {} of the data, the file holds {}", file, at, data_bytes);
}

}  // namespace

std::map<std::string, TensorInfo> parse_safetensors_header(const std::string& file, std::string_view text, uint64_t data_bytes) {
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first == std::string_view::npos || text[first] != '{' || text.find('\0') != std::string_view::npos) fail(Code::kCorruptModel, "{}: the header is no JSON object", file);
  std::map<std::string, TensorInfo> tensors;
  HeaderHandler handler(file, tensors);
  if (!json::sax_parse(text.begin(), text.end(), &handler) || !handler.complete())
    fail(Code::kCorruptModel, "{}: the header is not valid JSON", file);
  require_contiguous(file, tensors, data_bytes);
  return tensors;
}

SafetensorsFile::SafetensorsFile(std::unique_ptr<ModelFile> file) : file_(std::move(file)) {
  const uint64_t size = file_->size();
  if (size < 8) fail(Code::kCorruptModel, "{}: has {} bytes, a safetensors file has at least 8", name(), size);
  uint64_t header = 0;
  file_->read(0, &header, 8);
  if (header == 0 || header > kMaxHeaderBytes || header > size - 8)
    fail(Code::kCorruptModel, "{}: header length {} is impossible: the file has {} bytes, a header at most {}", name(), header, size,
         kMaxHeaderBytes);
  data_start_ = 8 + header;
  std::string text(header, '\0');
  file_->read(8, text.data(), text.size());
  tensors_ = parse_safetensors_header(name(), text, size - data_start_);
}

void SafetensorsFile::read(const std::string& tensor, const TensorInfo& info, uint64_t offset, void* out, size_t bytes) const {
  try {
    file_->read(data_start_ + info.begin + offset, out, bytes);
  } catch (const Error& e) {
    fail(e.code(), "{} (tensor '{}', from byte {} of its {})", e.what(), tensor, offset, info.end - info.begin);
  }
}

Checkpoint::Checkpoint(const ModelFiles& files) : name_(files.name()) {
  const char* const index = "model.safetensors.index.json";
  const char* const single = "model.safetensors";
  if (!files.has(single)) {
    if (!files.has(index)) fail(Code::kNotFound, "{}: holds neither {} nor {}", name_, single, index);
    read_index(files, index);
    return;
  }
  files_.push_back(std::make_unique<SafetensorsFile>(files.open(single)));
  for (const auto& [name, info] : files_[0]->tensors()) tensors_[name] = {files_[0].get(), &name, &info};
}

void Checkpoint::read_index(const ModelFiles& files, const std::string& index) {
  constexpr uint64_t kMaxIndexBytes = 256 << 20;
  constexpr size_t kMaxShards = 4096;
  const std::string where = files.name_of(index);
  const JsonTree tree = parse_json(read_text(files, index, kMaxIndexBytes), where);
  const json& object = tree.root();
  if (!object.is_object() || !object.contains("weight_map") || !object["weight_map"].is_object())
    fail(Code::kCorruptModel, "{}: weight_map is missing", where);
  std::map<std::string, const SafetensorsFile*> shards;
  for (const auto& [tensor, file] : object["weight_map"].items()) {
    if (!file.is_string()) fail(Code::kCorruptModel, "{}: tensor '{}': its file is no string", where, tensor);
    const std::string base = file.get<std::string>();
    if (base.empty() || base == "." || base == ".." || base.find('/') != std::string::npos || base.find('\0') != std::string::npos)
      fail(Code::kCorruptModel, "{}: tensor '{}': file '{}' is no plain file name", where, tensor, base);
    const SafetensorsFile*& shard = shards[base];
    if (shard == nullptr) {
      if (shards.size() > kMaxShards) fail(Code::kCorruptModel, "{}: more than {} files", where, kMaxShards);
      files_.push_back(std::make_unique<SafetensorsFile>(files.open(base)));
      shard = files_.back().get();
    }
    const auto it = shard->tensors().find(tensor);
    if (it == shard->tensors().end()) fail(Code::kCorruptModel, "{}: tensor '{}' is not in its file '{}'", where, tensor, base);
    tensors_[tensor] = {shard, &it->first, &it->second};
  }
  for (const auto& file : files_)
    for (const auto& [name, info] : file->tensors())
      if (tensors_.emplace(name, Tensor{file.get(), &name, &info}).first->second.file != file.get())
        fail(Code::kCorruptModel, "{}: tensor '{}' is in two files", where, name);
}

const Checkpoint::Tensor* Checkpoint::find(const std::string& name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

}  // namespace moebius
