"""One form of a request, for engines of ours and for plain vLLM, and one form of what they answer.

A request is a mapping that JSON can carry: `prompt`, a text or token ids; `image`, the file of one;
`adapter`, the directory of a LoRA adapter; `sampling`, fields of vLLM's SamplingParams, of which
`structured_outputs` is a mapping too. Without `sampling` it asks for a vector.
"""

import zlib
from collections.abc import Mapping
from typing import Any

from PIL import Image
from vllm import PoolingParams, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams


def prompt_of(request: Mapping[str, Any]) -> Any:
    """The prompt as vLLM takes it."""
    prompt: Any = request["prompt"]
    if not isinstance(prompt, str):
        return {"prompt_token_ids": list(prompt)}
    if (image := request.get("image")) is None:
        return prompt
    with Image.open(image) as opened:
        pixels = opened.convert("RGB")
    return {"prompt": prompt, "multi_modal_data": {"image": pixels}}


def sampling_fields(request: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `sampling`, as attributes of SamplingParams have them."""
    fields = dict(request["sampling"])
    if (structured := fields.get("structured_outputs")) is not None:
        fields["structured_outputs"] = StructuredOutputsParams(**structured)
    return fields


def params_of(request: Mapping[str, Any]) -> SamplingParams | PoolingParams:
    if request.get("sampling") is None:
        return PoolingParams(task="embed")
    return SamplingParams(**sampling_fields(request))


def adapter_of(request: Mapping[str, Any]) -> LoRARequest | None:
    """The adapter; the same directory is the same adapter."""
    if (path := request.get("adapter")) is None:
        return None
    return LoRARequest(path, zlib.crc32(path.encode()) & 0x7FFFFFFF, path)


def answer_of(output: Any) -> dict[str, Any]:
    """`token_ids`, and `logprobs` if they were asked for: per token (id, logprob) by id; or, of a
    vector, `vector`. Numbers are as they were computed: equal answers are equal bit by bit.
    """
    if not isinstance(output.outputs, list):
        return {"vector": output.outputs.data.tolist()}
    completion = output.outputs[0]
    answer: dict[str, Any] = {"token_ids": list(completion.token_ids)}
    if completion.logprobs is not None:
        answer["logprobs"] = [
            sorted([token, entry.logprob] for token, entry in position.items())
            for position in completion.logprobs
        ]
    return answer
