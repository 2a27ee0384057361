#include "route_attributes.h"

namespace dmoe {
namespace {

constexpr char const* kModes[] = {"token", "top_p", "top_c"};

} // namespace

bool readRouteAttributes(FieldReader& fields, char const* plugin, DmoeRouteAttributes& a)
{
    std::string const mode = fields.text("mode");
    a.mode = -1;
    for (int32_t i = 0; i < 3; ++i) {
        if (mode == kModes[i]) {
            a.mode = i;
        }
    }
    a.block_length = fields.integer("block_length");
    a.experts_per_token = fields.integer("experts_per_token");
    a.num_groups = fields.integer("num_groups");
    a.groups_kept = fields.integer("groups_kept");
    a.routed_scaling = fields.real("routed_scaling");
    std::string const score = fields.text("score_function");
    a.softmax = score == "softmax";
    a.renormalise = fields.integer("renormalise");
    if (!fields.problem().empty()) {
        logError(std::string(plugin) + ": " + fields.problem() + ".");
        return false;
    }
    if (a.mode < 0 || (score != "softmax" && score != "sigmoid")) {
        logError(std::string(plugin) + ": mode '" + mode + "' or score function '" + score + "' is not known.");
        return false;
    }
    return true;
}

void addRouteAttributes(Fields& fields, DmoeRouteAttributes const& a)
{
    fields.add("mode", std::string(kModes[a.mode]));
    fields.add("block_length", a.block_length);
    fields.add("experts_per_token", a.experts_per_token);
    fields.add("num_groups", a.num_groups);
    fields.add("groups_kept", a.groups_kept);
    fields.add("routed_scaling", a.routed_scaling);
    fields.add("score_function", std::string(a.softmax ? "softmax" : "sigmoid"));
    fields.add("renormalise", a.renormalise);
}

} // namespace dmoe
