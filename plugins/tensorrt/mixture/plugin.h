// DmoeMixture as an IPluginV3: DmoeExperts with the shared expert's weights as two more inputs. README.md beside this says
// what goes in and out.
#pragma once

#include "../experts/plugin.h"

namespace dmoe {

class MixturePlugin final : public ExpertsPlugin {
public:
    static constexpr char name[] = "DmoeMixture";

    explicit MixturePlugin(Form const& form) : ExpertsPlugin(form, name, true) {}

    static MixturePlugin* create(FieldReader& fields)
    {
        Form form{};
        return read(fields, name, form) ? new MixturePlugin(form) : nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override { return new (std::nothrow) MixturePlugin(form()); }
};

} // namespace dmoe
