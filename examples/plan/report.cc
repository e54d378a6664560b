// A study as a table for a terminal and as one page.
#include <fmt/format.h>

#include "examples/common/chart.h"
#include "examples/plan/study.h"

namespace moebius::plan {
namespace {

using json = nlohmann::ordered_json;
using moebius_examples::Chart;
using moebius_examples::escaped;

std::string text(const json& v) { return v.get<std::string>(); }
double number(const json& v) { return v.get<double>(); }
std::string gib(const json& bytes) { return fmt::format("{:.1f} GiB", number(bytes) / (1 << 30)); }
std::string mib(const json& bytes) { return fmt::format("{:.1f} MiB", number(bytes) / (1 << 20)); }

std::string rate(const json& v) {
  return number(v) < 1e12 ? fmt::format("{:.1f} GB/s", number(v) / 1e9) : fmt::format("{:.2f} TB/s", number(v) / 1e12);
}

std::string model_line(const json& s) {
  const json& m = s["model"];
  return fmt::format("{}: {} layers, hidden {}, {} experts of which a row takes {}, {} query and {} KV heads", text(m["name"]),
                     m["layers"].get<int>(), m["hidden"].get<int>(), m["experts"].get<int>(), m["top_k"].get<int>(), m["heads"].get<int>(),
                     m["kv_heads"].get<int>());
}

std::string cluster_line(const json& s) {
  const json &c = s["cluster"], &e = c["efficiency"];
  return fmt::format(
      "{}: {} device{} of {:.0f} GB, {}, {:.1f} TFLOP/s, links {:.0f} GB/s a direction; efficiencies memory {:.2f}, matrix {:.2f}, link "
      "{:.2f}",
      text(c["name"]), c["devices"].get<int>(), c["devices"].get<int>() == 1 ? "" : "s", number(c["memory_bytes"]) / 1e9, rate(c["memory_bandwidth"]),
      number(c["matrix_flops"]) / 1e12, number(c["link_bandwidth"]) / 1e9, number(e["memory"]), number(e["matrix"]), number(e["link"]));
}

using Rows = std::vector<std::vector<std::string>>;

Rows memory_rows(const json& s) {
  const json &m = s["memory"], &l = s["layer"];
  return {{"arena of a rank", gib(m["arena_bytes"])},
          {"  kept", gib(m["kept_bytes"])},
          {"  lead", fmt::format("{} ({:.2f} %)", mib(m["lead_bytes"]), number(m["lead_percent"]))},
          {"workspace, replicated", fmt::format("{}, {}", gib(m["workspace_bytes"]), gib(m["shared_bytes"]))},
          {"weights of a layer, TP", fmt::format("{} experts + {} attention", mib(l["tp_expert_bytes"]), mib(l["tp_attention_bytes"]))},
          {"weights of a layer, EP", fmt::format("{} experts + {} attention", mib(l["ep_expert_bytes"]), mib(l["ep_attention_bytes"]))},
          {"KV tokens, TP", fmt::format("{}", m["tp_tokens"].get<int64_t>())},
          {"KV tokens, EP", fmt::format("{} ({} a rank)", m["ep_tokens"].get<int64_t>(), m["ep_tokens"].get<int64_t>() / s["ranks"].get<int64_t>())}};
}

Rows switch_rows(const json& s) {
  Rows rows = {{"switch", "weights", "a rank gets", "KV a token", "weights alone", "KV half full"}};
  for (const json& w : s["switches"])
    rows.push_back({fmt::format("{} → {}", text(w["from"]), text(w["to"])), gib(w["weight_bytes"]), gib(w["rank_weight_bytes"]),
                    fmt::format("{:.1f} KiB", number(w["kv_bytes_changed_per_token"]) / 1024),
                    fmt::format("{:.0f} ms", 1e3 * number(w["weight_seconds"])), fmt::format("{:.0f} ms", 1e3 * number(w["half_full_seconds"]))});
  return rows;
}

Rows step_rows(const json& s) {
  Rows rows = {{"requests", "TP step", "EP step", "TP tokens/s", "EP tokens/s", "EP ÷ TP"}};
  for (const json& r : s["steps"]) {
    const bool tp = r["tp_holds"], ep = r["ep_holds"];
    const char* const short_of_kv = tp && ep ? "" : tp ? " (KV: not in EP)" : ep ? " (KV: not in TP)" : " (KV: in neither)";
    rows.push_back({fmt::format("{:.0f}{}", number(r["requests"]), short_of_kv),
                    fmt::format("{:.3f} ms", 1e3 * number(r["tp_seconds"])), fmt::format("{:.3f} ms", 1e3 * number(r["ep_seconds"])),
                    fmt::format("{:.0f}", number(r["tp_tokens_per_second"])), fmt::format("{:.0f}", number(r["ep_tokens_per_second"])),
                    fmt::format("{:.2f}", number(r["ep_over_tp"]))});
  }
  return rows;
}

Rows run_rows(const json& w) {
  Rows rows = {{"choice", "seconds", "tokens/s", "to first token", "a token", "an answer", "switches", "preemptions"}};
  for (const auto& [name, r] : w["runs"].items())
    rows.push_back({name, fmt::format("{:.2f}", number(r["seconds"])), fmt::format("{:.0f}", number(r["tokens_per_second"])),
                    fmt::format("{:.3f} s", number(r["first_token_s"])), fmt::format("{:.1f} ms", 1e3 * number(r["token_gap_s"])),
                    fmt::format("{:.2f} s", number(r["answer_s"])),
                    fmt::format("{} ({:.0f} ms)", r["switches"].get<int>(), 1e3 * number(r["switch_seconds"])),
                    fmt::format("{}", r["preemptions"].get<int64_t>())});
  rows.push_back({"best in hindsight", fmt::format("{:.2f}", number(w["hindsight_seconds"])), "", "", "", "", "", ""});
  return rows;
}

size_t width_of(const std::string& s) {  // in characters, not bytes
  size_t n = 0;
  for (char c : s) n += (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  return n;
}

std::string aligned(const Rows& rows) {
  std::vector<size_t> widths;
  for (const auto& row : rows)
    for (size_t i = 0; i < row.size(); ++i) {
      if (i == widths.size()) widths.push_back(0);
      widths[i] = std::max(widths[i], width_of(row[i]));
    }
  std::string out;
  for (const auto& row : rows) {
    out += "  ";
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string pad(widths[i] - width_of(row[i]), ' ');
      out += i == 0 ? row[i] + pad : "  " + pad + row[i];
    }
    out += "\n";
  }
  return out;
}

std::string html_table(const Rows& rows, bool head) {
  std::string out = "<div class=\"scroll\"><table>";
  for (size_t i = 0; i < rows.size(); ++i) {
    out += "<tr>";
    for (const std::string& cell : rows[i]) out += fmt::format("<{0}>{1}</{0}>", head && i == 0 ? "th" : "td", escaped(cell));
    out += "</tr>";
  }
  return out + "</table></div>\n";
}

Chart speed_chart(const json& s) {
  Chart c{"Simulated: output tokens a second over requests at a time", "requests", "tokens/s", {}, {}, true, 0, 220};
  for (const char* layout : {"tp", "ep"}) {
    moebius_examples::Series series{layout, layout, {}, false, false, true};
    for (const json& r : s["steps"]) series.points.emplace_back(number(r["requests"]), number(r[std::string(layout) + "_tokens_per_second"]));
    c.series.push_back(std::move(series));
  }
  if (!s["crossover"]["requests"].is_null()) c.marks.push_back({number(s["crossover"]["requests"]), "crossover"});
  return c;
}

Chart load_chart(const json& w) {
  Chart c{"Simulated: the policy `measured`, requests running and waiting", "seconds", "requests", {}, {}, false, 0, 200};
  moebius_examples::Series running{"running", "good", {}, true, true, false}, waiting{"waiting", "second", {}, true, false, false};
  std::string layout;
  for (const json& m : w["measured_moments"]) {
    running.points.emplace_back(number(m[0]), number(m[1]));
    waiting.points.emplace_back(number(m[0]), number(m[2]));
    if (text(m[3]) != layout && !layout.empty()) c.marks.push_back({number(m[0]), "→ " + text(m[3])});
    layout = text(m[3]);
  }
  c.series = {running, waiting};
  return c;
}

}  // namespace

std::string table_of(const json& s) {
  std::string out = "SIMULATED: every number below is predicted, none measured\n\n" + model_line(s) + "\n";
  if (!s["model"]["served"].get<bool>()) out += "  " + text(s["model"]["note"]) + "\n";
  out += cluster_line(s) + "\n";
  out +=
      fmt::format("{} ranks × {} replica{}, {} planned with on each: {}\n\n", s["ranks"].get<int>(), s["replicas"].get<int>(),
                  s["replicas"].get<int>() == 1 ? "" : "s", gib(s["memory_bytes"]),
                  s["fits"].get<bool>() ? "fits" : "does not fit (" + gib(s["least_memory_bytes"]) + " are needed); what follows has one page of KV");
  out += "simulated memory\n" + aligned(memory_rows(s)) + "\nsimulated switches\n" + aligned(switch_rows(s)) +
         fmt::format("\nsimulated decode steps of one replica, {:.0f} tokens of context a request\n", number(s["crossover"]["context"])) +
         aligned(step_rows(s));
  if (s.contains("workload"))
    out += fmt::format("\nsimulated workload: {}{}\n", text(s["workload"]["text"]), s["replicas"].get<int>() > 1 ? ", one replica's part" : "") +
           aligned(run_rows(s["workload"]));
  return out + "\n" + text(s["recommendation"]) + "\n";
}

std::string page_of(const json& s) {
  const std::string title = fmt::format("{} on {} (simulated)", text(s["model"]["name"]), text(s["cluster"]["name"]));
  std::string body = "<h1>" + escaped(title) + "</h1>\n<p>Every number on this page is simulated, none measured. " + escaped(model_line(s)) + ". " +
                     escaped(cluster_line(s)) + fmt::format(". {} ranks × {} replicas.", s["ranks"].get<int>(), s["replicas"].get<int>()) + "</p>\n";
  body += "<p><b>" + escaped(text(s["recommendation"])) + "</b></p>\n";
  if (!s["model"]["served"].get<bool>()) body += "<p>" + escaped(text(s["model"]["note"])) + "</p>\n";
  body += moebius_examples::figure(speed_chart(s)) + "<h2>Steps (simulated)</h2>\n" + html_table(step_rows(s), true);
  if (s.contains("workload"))
    body += "<h2>Workload (simulated)</h2>\n<p>" + escaped(text(s["workload"]["text"])) + "</p>\n" +
            moebius_examples::figure(load_chart(s["workload"])) + html_table(run_rows(s["workload"]), true);
  body += "<h2>Memory (simulated)</h2>\n" + html_table(memory_rows(s), false) + "<h2>Switches (simulated)</h2>\n" + html_table(switch_rows(s), true);
  body += "<h2>Sources of the cluster's numbers</h2>\n";
  for (const json& source : s["cluster"]["sources"]) body += "<p>" + escaped(text(source)) + "</p>\n";
  return moebius_examples::page(title, body);
}

}  // namespace moebius::plan
