"""Tasks of lm-evaluation-harness run on a model here, with the numbers of the library: `make test-lm-eval`.

Not a part of the other tests, because the package brings much that nothing else needs. The task is a local file.
"""

import json

import lm_eval
import numpy as np
import pytest
from lm_eval.tasks import TaskManager

from tests.cli.test_eval import write_model
from tttlm.data.tokenizer import ByteTokenizer
from tttlm.evaluation.harness import HarnessModel
from tttlm.inference import generate, stream_losses
from tttlm.interop import from_pretrained

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{target}"
{rest}
"""
CHOICE = "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}]"
ROLLING = "metric_list: [{metric: bits_per_byte}]"
WRITTEN = "generation_kwargs: {until: ['e'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("harness")
    write_model(path / "model", 0)
    questions = ["The red cat sees", "A blue bird", "In a green tree it"]
    documents = [
        {"question": question, "choices": [" a tree", " the river", " on"], "answer": number}
        for number, question in enumerate(questions)
    ]
    (path / "data.jsonl").write_text("\n".join(json.dumps(document) for document in documents))
    tasks = {
        "choice": ("multiple_choice", "{{answer}}", CHOICE),
        "rolling": ("loglikelihood_rolling", "{{question}}", ROLLING),
        "written": ("generate_until", "{{answer}}", WRITTEN),
    }
    for name, (kind, target, rest) in tasks.items():
        text = TASK.format(name=name, data=path / "data.jsonl", kind=kind, target=target, rest=rest)
        (path / f"{name}.yaml").write_text(
            text.replace('doc_to_text: "{{question}}"', 'doc_to_text: ""', name == "rolling")
        )
    return path, documents


def test_tasks_of_all_three_kinds_have_the_numbers_of_the_library(folder):
    path, documents = folder
    harness = HarnessModel(str(path / "model"), tokenizer="bytes", chunk=32)
    manager = TaskManager(include_path=str(path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        harness, tasks=["choice", "rolling", "written"], task_manager=manager, torch_random_seed=None, bootstrap_iters=0
    )
    model, tokenizer = from_pretrained(path / "model"), ByteTokenizer()

    def nats(context: str, text: str) -> float:
        tokens = np.asarray([257, *(context + text).encode()])
        losses = np.concatenate([part.nats for part in stream_losses(model, [[tokens]], batch_size=1, chunk=32)])
        return float(losses[len(context.encode()) :].sum())

    right = [
        int(np.argmin([nats(one["question"], choice) for choice in one["choices"]])) == one["answer"]
        for one in documents
    ]
    assert found["results"]["choice"]["acc,none"] == pytest.approx(np.mean(right))
    total = sum(nats("", one["question"]) for one in documents)
    size = sum(len(one["question"].encode()) for one in documents)
    assert found["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(total / size / np.log(2), rel=1e-4)
    for sample, one in zip(found["samples"]["written"], documents, strict=True):
        expected = generate(model, one["question"], tokenizer, max_tokens=8, temperature=0.0, stop=["e"])[0]
        assert sample["resps"][0][0] == expected.text
