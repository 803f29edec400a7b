import json
from pathlib import Path

import jsonschema
import pytest

from search.errors import InvalidRequest
from search.exports import render
from search.exports.native import check_document, json_schema, read_native
from tests.search.exports.examples import dealt, exported, llama

SCHEMES = ("w4a16g64", "w6a16g32asym", "w8a8", "w3a8", "w16a16", "w8a16")
PUBLISHED = Path(__file__).parents[3] / "docs" / "configuration.schema.json"


@pytest.fixture(scope="module")
def text():
    return render("json", exported(llama(), dealt(llama(), SCHEMES)))


def test_it_is_read_back_as_it_was_written(text):
    read = read_native(text)
    allocation = dealt(llama(), SCHEMES)
    assert {name: str(scheme) for name, scheme in read.schemes.items()} == allocation
    assert [layer.name for layer in read.layers] == [layer.name for layer in llama().layers if layer.name in allocation]
    assert set(read.full_precision) == {"model.embed_tokens", "lm_head"}
    assert (read.model.digest, read.target, read.quantizer) == (llama().digest, "vllm", "mse")
    assert read.costs == {"avg_bits": 5.25, "size_bytes": 1000.0}
    assert read.metrics["loss"] == 0.25
    assert read.model_dump_json(by_alias=True, indent=2) + "\n" == text


def test_it_names_the_parts_of_a_layer():
    name = "model.layers.3.mlp.down_proj"
    allocation = {f"{name}[0:48]": "w4a16g64", f"{name}[48:64]": "w8a16"}
    read = read_native(render("json", exported(llama(), allocation)))
    assert {name: str(scheme) for name, scheme in read.schemes.items()} == allocation
    assert [(layer.name, layer.rows, layer.columns) for layer in read.layers] == [
        (f"{name}[0:48]", 48, 128),
        (f"{name}[48:64]", 16, 128),
    ]
    assert name not in read.full_precision
    assert "model.layers.3.mlp.up_proj" in read.full_precision


def test_its_published_schema_is_current_and_holds(text):
    """Written by: python -c "from search.exports.native import json_schema; print(json_schema(), end='')"."""
    assert PUBLISHED.read_text() == json_schema()
    schema = json.loads(PUBLISHED.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(text) | {"version": 2}, schema, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": 2}, "version"),
        ({"schema": "other"}, "schema"),
        ({"costs": {"avg_bits": "many"}}, "costs.avg_bits"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_it_refuses_other_documents(text, change, field):
    with pytest.raises(InvalidRequest) as caught:
        read_native(json.dumps(json.loads(text) | change))
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["schema", "version"])
def test_it_refuses_a_document_that_does_not_say_what_it_is(text, field):
    document = json.loads(text)
    del document[field]
    with pytest.raises(InvalidRequest) as caught:
        read_native(json.dumps(document))
    assert caught.value.field == field


def edited(text, change):
    document = json.loads(text)
    change(document)
    return read_native(json.dumps(document))


def test_it_fits_the_model_that_it_was_written_for(text):
    check_document(read_native(text), llama())
    name = "model.layers.3.mlp.down_proj"
    parts = render("json", exported(llama(), {f"{name}[0:16]": "w4a16g64", f"{name}[48:64]": "w8a16"}))
    check_document(read_native(parts), llama())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda document: document.update(target="foo"), "target"),
        (lambda document: document["model"].update(architecture="BertModel"), "model.architecture"),
        (lambda document: document["layers"].append(document["layers"][0]), "layers.84.name"),
        (lambda document: document["layers"].pop(), "full_precision"),
        (lambda document: document.update(full_precision=["lm_head"]), "full_precision"),
        (lambda document: document.update(full_precision=["nowhere"]), "full_precision.0"),
        (lambda document: document["layers"][0].update(name="nowhere"), "layers.0.name"),
        (lambda document: document["layers"][0].update(kind="conv"), "layers.0.kind"),
        (lambda document: document["layers"][0].update(rows=1), "layers.0.rows"),
        (lambda document: document["layers"][0].update(columns=1), "layers.0.columns"),
    ],
)
def test_an_edited_document_that_does_not_fit_the_model_is_refused(text, change, field):
    with pytest.raises(InvalidRequest) as caught:
        check_document(edited(text, change), llama())
    assert caught.value.field == field


@pytest.mark.parametrize("channels", ["0:999999", "9:9", "5:1", f"0:{'9' * 5000}", f"{'9' * 5000}:1"])
def test_channels_that_a_layer_does_not_have_are_refused(text, channels):
    def change(document):
        document["layers"][0]["name"] += f"[{channels}]"

    with pytest.raises(InvalidRequest) as caught:
        check_document(edited(text, change), llama())
    assert caught.value.field == "layers.0.name"


def test_it_refuses_a_layer_that_contradicts_its_scheme(text):
    document = json.loads(text)
    document["layers"][0]["weight_bits"] = 7
    with pytest.raises(InvalidRequest, match="contradict"):
        read_native(json.dumps(document))
