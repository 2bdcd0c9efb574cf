"""Clients of other servers, unchanged, beside this server's own API."""

import huggingface_hub
import numpy
import pytest
import requests
import tritonclient.http
from huggingface_hub import InferenceClient
from tritonclient.utils import InferenceServerException

from server import ADMIN, READER

TEXT = "the cat sat"
TEXTS = ["the cat sat", "a", "one two three"]
PAIR = {"text": "the cat", "text_pair": "sat"}


def own(server, inputs, task="pairs", raw=False):
    """Scores by label of this server's own API."""
    body = {"inputs": inputs, "raw_scores": raw}
    answer = requests.post(f"{server.url}/v1/classify/{task}", json=body)
    assert answer.status_code == 200, answer.text
    return [prediction["scores"] for prediction in answer.json()["predictions"]]


def same(given, expected):
    """Whether label and score pairs are those of a dictionary, the highest first."""
    assert [label for label, _ in given] == sorted(expected, key=expected.get, reverse=True)
    for label, score in given:
        assert score == pytest.approx(expected[label], abs=1e-6)


class TestHuggingFace:
    def labels(self, answer):
        return [(element.label, element.score) for element in answer]

    @pytest.mark.parametrize("path", ["", "/tasks/pairs"])
    def test_a_text_gets_its_labels(self, server, path):
        client = InferenceClient(base_url=server.url + path)
        answer = client.text_classification(TEXT)
        same(self.labels(answer), own(server, TEXT)[0])

    def test_the_address_may_be_the_model(self, server):
        answer = InferenceClient(model=f"{server.url}/tasks/labels").text_classification(TEXT)
        same(self.labels(answer), own(server, TEXT, "labels")[0])
        address = f"{server.url}/tasks/labels"
        answer = InferenceClient().text_classification(TEXT, model=address)
        same(self.labels(answer), own(server, TEXT, "labels")[0])

    def test_top_k_and_the_function_are_heard(self, server):
        client = InferenceClient(base_url=f"{server.url}/tasks/pairs")
        answer = client.text_classification(TEXT, top_k=1, function_to_apply="none")
        logits = own(server, TEXT, raw=True)[0]
        best = max(logits, key=logits.get)
        assert self.labels(answer) == [(best, pytest.approx(logits[best], abs=1e-6))]
        answer = client.text_classification(TEXT, function_to_apply="sigmoid")
        expected = {label: 1 / (1 + numpy.exp(-logit)) for label, logit in logits.items()}
        same(self.labels(answer), expected)

    def test_errors_reach_the_caller(self, server):
        client = InferenceClient(base_url=f"{server.url}/tasks/nothing")
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as error:
            client.text_classification(TEXT)
        assert error.value.response.status_code == 404
        assert error.value.response.json()["error"].endswith("the tasks are: labels, pairs")
        client = InferenceClient(base_url=f"{server.url}/tasks/pairs")
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="whitespace"):
            client.text_classification(" ")

    def test_its_token_is_a_token(self, closed):
        client = InferenceClient(base_url=closed.url, token=READER)
        assert client.text_classification(TEXT)
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as error:
            InferenceClient(base_url=closed.url, token="hf_another").text_classification(TEXT)
        assert error.value.response.status_code == 401

    def test_a_token_of_another_service_does_not_shut_an_open_server(self, server):
        client = InferenceClient(base_url=server.url, token="hf_another")
        assert client.text_classification(TEXT)


class TestTextEmbeddingsInference:
    """What its clients send and read; the shapes are those of its OpenAPI document."""

    def post(self, server, body, path="", status=200):
        answer = requests.post(f"{server.url}{path}/predict", json=body)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/json"
        return answer.json()

    def labels(self, scores):
        return [(element["label"], element["score"]) for element in scores]

    @pytest.mark.parametrize("path", ["", "/tasks/pairs"])
    def test_a_text_a_pair_and_a_batch(self, server, path):
        answer = self.post(server, {"inputs": TEXT}, path)
        same(self.labels(answer), own(server, TEXT)[0])
        answer = self.post(server, {"inputs": ["the cat", "sat"]}, path)
        same(self.labels(answer), own(server, PAIR)[0])
        batch = {"inputs": [[TEXT], ["the cat", "sat"]]}
        for scores, expected in zip(self.post(server, batch, path), own(server, [TEXT, PAIR])):
            same(self.labels(scores), expected)

    def test_raw_scores_are_logits(self, server):
        answer = self.post(server, {"inputs": TEXT, "raw_scores": True, "truncate": True})
        same(self.labels(answer), own(server, TEXT, raw=True)[0])

    def test_a_long_text_is_refused_unless_it_may_be_cut(self, server):
        long = "the cat " * 500
        error = self.post(server, {"inputs": long}, status=413)
        assert error["error_type"] == "validation" and "tokens" in error["error"]
        assert self.post(server, {"inputs": long, "truncate": True})

    def test_the_side_that_is_cut_is_heard(self, server):
        ends = {"Left": "sat " * 500, "right": "the cat " * 500}
        long = ends["right"] + ends["Left"]
        for direction, kept in ends.items():
            body = {"truncate": True, "truncation_direction": direction}
            answer = self.post(server, body | {"inputs": long})
            assert answer == self.post(server, body | {"inputs": kept}), direction

    def test_errors_have_its_form(self, server):
        for body, status, kind in [
            ({"inputs": ""}, 400, "empty"),
            ({"inputs": []}, 400, "empty"),
            ({"inputs": ["a", "b", "c"]}, 422, "validation"),
            ({"inputs": [["a"]] * 1000}, 413, "validation"),
            ({}, 422, "validation"),
        ]:
            error = self.post(server, body, status=status)
            assert error["error_type"] == kind, error
            assert isinstance(error["error"], str)

    @pytest.mark.parametrize("path", ["", "/tasks/pairs"])
    def test_info_describes_a_classifier(self, server, path):
        info = requests.get(f"{server.url}{path}/info").json()
        assert info["model_id"] == "pairs" and info["model_dtype"] == "float32"
        labels = info["model_type"]["classifier"]
        assert {i: name for name, i in labels["label2id"].items()} == {
            int(i): name for i, name in labels["id2label"].items()
        }
        for field in ["max_concurrent_requests", "max_input_length", "max_batch_tokens"]:
            assert info[field] > 0
        assert info["auto_truncate"] is False and info["max_client_batch_size"] == 256

    def test_health(self, server, closed):
        assert requests.get(f"{server.url}/health").status_code == 200
        assert requests.get(f"{closed.url}/health").status_code == 200

    def test_a_server_with_tasks_and_no_default_says_so(self):
        from server import Server

        with Server() as running:
            answer = requests.post(f"{running.url}/predict", json={"inputs": TEXT})
            assert answer.status_code == 404 and "--default-task" in answer.json()["error"]


class TestTriton:
    @pytest.fixture
    def client(self, server):
        client = tritonclient.http.InferenceServerClient(f"{server.host}:{server.port}")
        yield client
        client.close()

    def tensor(self, texts, name="text", binary=True, column=False):
        values = numpy.array([text.encode() for text in texts], dtype=object)
        if column:
            values = values.reshape(-1, 1)
        tensor = tritonclient.http.InferInput(name, list(values.shape), "BYTES")
        tensor.set_data_from_numpy(values, binary_data=binary)
        return tensor

    def test_health_and_metadata(self, client):
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("pairs") and client.is_model_ready("pairs", "1")
        assert not client.is_model_ready("nothing")
        server = client.get_server_metadata()
        assert server["name"] == "kdlora" and "binary_tensor_data" in server["extensions"]
        for version in ("", "1"):
            model = client.get_model_metadata("pairs", version)
            assert model["name"] == "pairs" and model["versions"] == ["1"]
            assert model["inputs"][0] == {"name": "text", "datatype": "BYTES", "shape": [-1]}
        listed = client.get_model_repository_index()
        assert [model["name"] for model in listed] == ["labels", "pairs"]

    @pytest.mark.parametrize("binary", [True, False])
    @pytest.mark.parametrize("column", [True, False])
    def test_texts_in_and_tensors_out(self, server, client, binary, column):
        inputs = [self.tensor(TEXTS, binary=binary, column=column)]
        expected = own(server, TEXTS)
        result = client.infer("pairs", inputs, request_id="seven")
        assert result.get_response()["id"] == "seven"
        labels = client.get_model_metadata("pairs")["parameters"]["labels"]
        scores = result.as_numpy("scores")
        assert scores.shape == (3, len(labels)) and scores.dtype == numpy.float32
        for row, wanted in zip(scores, expected):
            assert dict(zip(labels, row)) == pytest.approx(wanted, abs=1e-6)
        best = [max(row, key=row.get) for row in expected]
        assert [label.decode() for label in result.as_numpy("label")] == best
        assert result.as_numpy("score") == pytest.approx([r[b] for r, b in zip(expected, best)])
        logits = own(server, TEXTS, raw=True)
        for row, wanted in zip(result.as_numpy("logits"), logits):
            assert dict(zip(labels, row)) == pytest.approx(wanted, abs=1e-5)

    @pytest.mark.parametrize("binary", [True, False])
    def test_only_the_outputs_that_are_wanted(self, client, binary):
        wanted = [
            tritonclient.http.InferRequestedOutput("score", binary_data=binary),
            tritonclient.http.InferRequestedOutput("label", binary_data=not binary),
        ]
        result = client.infer("pairs", [self.tensor(TEXTS)], outputs=wanted, model_version="1")
        names = [output["name"] for output in result.get_response()["outputs"]]
        assert names == ["score", "label"]
        assert result.as_numpy("score").shape == (3,) and result.as_numpy("label").shape == (3,)

    @pytest.mark.parametrize("binary", [True, False])
    def test_compressed_requests(self, client, binary):
        inputs = [self.tensor(TEXTS, binary=binary)]
        plain = client.infer("pairs", inputs).as_numpy("scores")
        packed = client.infer("pairs", inputs, request_compression_algorithm="gzip")
        assert packed.as_numpy("scores") == pytest.approx(plain)
        with pytest.raises(InferenceServerException, match="deflate"):
            client.infer("pairs", inputs, request_compression_algorithm="deflate")

    def test_pairs_are_two_tensors(self, server, client):
        inputs = [self.tensor(["the cat"]), self.tensor(["sat"], "text_pair", binary=False)]
        scores = client.infer("pairs", inputs).as_numpy("scores")[0]
        assert sorted(scores) == pytest.approx(sorted(own(server, PAIR)[0].values()), abs=1e-6)

    def test_without_binary_data_the_answer_is_plain_json(self, server):
        body = {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": [TEXT]}]}
        answer = requests.post(f"{server.url}/v2/models/pairs/infer", json=body)
        assert answer.headers["content-type"] == "application/json"
        outputs = {output["name"]: output for output in answer.json()["outputs"]}
        assert outputs["label"]["data"][0] in own(server, TEXT)[0]

    def test_errors_reach_the_caller(self, client):
        for model, version, inputs, sentence in [
            ("nothing", "", [self.tensor(TEXTS)], "there is no task"),
            ("pairs", "9", [self.tensor(TEXTS)], "is not live"),
            ("pairs", "", [self.tensor([" "])], "whitespace"),
            ("pairs", "", [self.tensor(TEXTS), self.tensor(["a"], "text_pair")], "3 rows"),
            ("pairs", "", [self.tensor(TEXTS), self.tensor(TEXTS, "other")], "other"),
        ]:
            with pytest.raises(InferenceServerException, match=sentence):
                client.infer(model, inputs, model_version=version)

    def test_a_token_in_a_header(self, closed):
        client = tritonclient.http.InferenceServerClient(f"{closed.host}:{closed.port}")
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="Authorization"):
            client.infer("pairs", [self.tensor(TEXTS)])
        for token in (READER, ADMIN):
            headers = {"Authorization": f"Bearer {token}"}
            assert client.infer("pairs", [self.tensor(TEXTS)], headers=headers)
        client.close()
