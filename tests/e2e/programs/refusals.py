"""What is said of options that a hosted model cannot have; `wanted`: [kind of device, options]."""

from common import read_job, report

from aegaeon.core.config import ModelConfig
from aegaeon.core.errors import ConfigError
from aegaeon.vllm_plugin.engine_config import serve_args


def main() -> None:
    messages = []
    for device_kind, options in read_job()["wanted"]:
        try:
            serve_args(ModelConfig(model="/m", name="m", vllm=options), device_kind=device_kind)
        except ConfigError as error:
            messages.append(str(error))
        else:
            messages.append("accepted")
    report({"messages": messages})


if __name__ == "__main__":
    main()
