"""Runs in `.venv-triton`: streams of tritonclient's gRPC client; a JSON object on standard input, one on output.

Asked: url, model, requests (a list of {inputs: {name: value}} and, where wanted, parameters, id, outputs: names,
cancel_after: responses).
Answered: a list of {parts: [{output: value}], seconds: [of each part], error, final: whether the last said so}.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import numpy as np
import tritonclient.grpc as client


def tensor(name, value):
    if isinstance(value, bool):
        array, kind = np.array([value]), "BOOL"
    elif isinstance(value, str):
        array, kind = np.array([value.encode("utf-8", "surrogateescape")], np.object_), "BYTES"
    else:
        array, kind = np.array(value, np.int64), "INT64"
    made = client.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made


def plain(array):
    return [one.decode() if isinstance(one, bytes) else one for one in array.tolist()]


def stream(url, model, request, answers, number):
    answer = answers[number] = {"parts": [], "seconds": [], "error": None, "final": False}
    over, start = threading.Event(), time.monotonic()
    with client.InferenceServerClient(url) as connection:

        def told(result, error):
            if error is not None:
                answer["error"] = [error.message(), error.status()]
                over.set()
                return
            got = result.get_response()
            if got.outputs:
                answer["parts"].append({one.name: plain(result.as_numpy(one.name)) for one in got.outputs})
                answer["seconds"].append(time.monotonic() - start)
            if got.parameters["triton_final_response"].bool_param:
                answer["final"] = True
                over.set()
            if len(answer["parts"]) == request.get("cancel_after"):
                over.set()

        connection.start_stream(told)
        connection.async_stream_infer(
            model, [tensor(*one) for one in request["inputs"].items()], request_id=request.get("id", ""),
            outputs=[client.InferRequestedOutput(one) for one in request["outputs"]] if "outputs" in request else None,
            parameters=request.get("parameters"), enable_empty_final_response=True)
        assert over.wait(60), answer
        connection.stop_stream(cancel_requests="cancel_after" in request)


def main():
    asked = json.load(sys.stdin)
    answers = [None] * len(asked["requests"])
    threads = [threading.Thread(target=stream, args=(asked["url"], asked["model"], one, answers, number))
               for number, one in enumerate(asked["requests"])]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    json.dump(answers, sys.stdout)


main()
