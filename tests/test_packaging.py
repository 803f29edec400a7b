import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from api.settings import Settings

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
WORKERS_ONLY = {
    "torch",
    "scipy",
    "ray",
    "transformers",
    "safetensors",
    "gguf",
    "accelerate",
    "huggingface-hub",
    "pillow",
}


def requirements(texts):
    return {requirement.name: requirement for requirement in map(Requirement, texts)}


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        name.lower().replace("_", "-"): version
        for name, version in re.findall(r"^(\S+)==(\S+)$", "\n".join(lines), re.M)
    }


def test_constraints_are_plain_pins():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)


@pytest.mark.parametrize("extra", [None, "demo", "gpu", "dev"])
def test_constraints_pin_every_dependency_within_its_range(extra):
    project = PROJECT["project"]
    texts = project["optional-dependencies"][extra] if extra else project["dependencies"]
    for name, requirement in requirements(texts).items():
        assert requirement.specifier.contains(pins()[name]), f"{name} is pinned to {pins()[name]}"


def test_the_api_group_is_the_dependencies_without_those_of_workers():
    everything = requirements(PROJECT["project"]["dependencies"])
    api = requirements(PROJECT["dependency-groups"]["api"])
    assert set(everything) - set(api) == WORKERS_ONLY
    assert all(everything[name] == requirement for name, requirement in api.items())


def test_compose_file_fits_the_specification():
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    jsonschema.Draft7Validator(schema).validate(COMPOSE)


def test_nothing_starts_before_the_schema_is_up_to_date():
    assert SERVICES["migrate"]["command"] == ["python", "-m", "db", "migrate"]
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in ("api", "worker", "worker-gpu"):
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_postgres_keeps_its_data_and_is_healthy_once_it_is_reached_over_the_network():
    postgres = SERVICES["postgres"]
    assert postgres["image"] == "postgres:18"
    assert "postgres:/var/lib/postgresql" in postgres["volumes"]
    assert {"pg_isready", "--host"} <= set(postgres["healthcheck"]["test"])


def test_the_service_is_no_superuser_of_its_database():
    assert "POSTGRES_USER" not in SERVICES["postgres"]["environment"]
    assert "./docker/roles.sql:/docker-entrypoint-initdb.d/roles.sql:ro" in SERVICES["postgres"]["volumes"]
    assert "://bitfrontier@" in SERVICES["api"]["environment"]["BITFRONTIER_DATABASE_URL"]


def test_secrets_come_from_files():
    assert all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())
    for name, service in SERVICES.items():
        for variable, value in service["environment"].items():
            if re.search("PASSWORD|TOKEN|SECRET|KEY", variable):
                assert variable.endswith(("_FILE", "_PATH")), f"{name} is given {variable} in the clear"
                assert Path(value).name in service["secrets"]
        assert not re.search(r"://[^@/]*:[^@/]*@", str(service["environment"]))


def test_only_the_api_is_reached_from_outside_and_only_from_this_machine():
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"api"}
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["api"]["ports"])
    assert COMPOSE["networks"]["data"]["internal"]
    assert COMPOSE["networks"]["ray"]["internal"]
    assert all(service["networks"] for service in SERVICES.values())
    assert not any("network_mode" in service for service in SERVICES.values())


def test_whoever_reaches_the_api_needs_a_key():
    assert SERVICES["api"]["environment"]["BITFRONTIER_AUTH"] == "keys"


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_no_privileges_and_cannot_write_to_itself(name):
    service = SERVICES[name]
    assert service["user"] in ("bitfrontier", "postgres")
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & set(service)


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_cannot_take_the_whole_machine(name):
    limits = SERVICES[name]["deploy"]["resources"]["limits"]
    assert {"memory", "pids"} <= set(limits)
    assert SERVICES[name]["logging"]["options"]["max-size"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_says_whether_it_is_well_or_ends(name):
    service = SERVICES[name]
    if service["restart"] == "no":
        assert name == "migrate"
    else:
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", ["worker", "worker-gpu"])
def test_a_worker_gets_the_time_it_needs_to_leave(name):
    worker = SERVICES[name]
    assert seconds(worker["stop_grace_period"]) >= int(worker["environment"]["BITFRONTIER_GRACE_SECONDS"]) + 20


def test_models_are_read_and_never_written():
    for name in ("worker", "worker-gpu", "ray-head", "ray-worker", "ray-worker-gpu"):
        root = SERVICES[name]["environment"]["BITFRONTIER_MODELS"]
        assert f"${{BITFRONTIER_MODELS:-./models}}:{root}:ro" in SERVICES[name]["volumes"]


def test_workers_with_and_without_gpus_are_chosen_by_profile():
    assert SERVICES["worker"]["profiles"] == ["cpu"]
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]
    for name in ("worker-gpu", "ray-worker-gpu"):
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        assert SERVICES[name]["build"]["args"] == {"EXTRAS": "[gpu]"}
    for name in ("worker", "ray-head", "ray-worker"):
        assert "reservations" not in SERVICES[name]["deploy"]["resources"]


def test_ray_asks_for_its_token_and_a_cluster_is_optional():
    for name in ("worker", "worker-gpu", "ray-head", "ray-worker", "ray-worker-gpu"):
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert "ray_token" in SERVICES[name]["secrets"]
    assert SERVICES["ray-head"]["profiles"] == ["ray", "ray-gpu"]
    assert SERVICES["ray-worker"]["profiles"] == ["ray"]
    assert SERVICES["ray-worker-gpu"]["profiles"] == ["ray-gpu"]
    assert SERVICES["worker"]["depends_on"]["ray-head"] == {"condition": "service_healthy", "required": False}


def test_the_head_of_the_cluster_computes_nothing():
    assert {"--num-cpus=0", "--num-gpus=0", "--include-dashboard=false"} <= set(SERVICES["ray-head"]["command"])


def seconds(text):
    assert re.fullmatch(r"\d+s", text)
    return int(text[:-1])


def stages():
    """Name → body of each stage of the Dockerfile."""
    parts = re.split(r"^FROM \S+ AS (\S+)$", DOCKERFILE, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_images_are_built_from_stages_that_drop_root():
    built = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert built == {"api", "worker"}
    for name in built:
        body = stages()[name]
        assert body.index("USER bitfrontier") < body.index("CMD [")


def test_the_api_image_installs_the_group_without_torch():
    body = stages()["api"]
    assert "--group api" in body
    assert "--no-deps ." in body


def test_files_that_images_are_built_from_are_sent():
    ignore = (ROOT / ".dockerignore").read_text()
    metadata = PROJECT["project"]
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    for needed in (*packages, metadata["readme"], *metadata["license-files"], "constraints.txt", "docker"):
        assert f"!{needed}\n" in ignore


def test_with_secrets_gives_libpq_the_password(tmp_path):
    secret = tmp_path / "password"
    secret.write_text("correct horse\n")
    ran = subprocess.run(
        [ROOT / "docker/with-secrets", "sh", "-c", 'printf %s "$PGPASSWORD"'],
        env={"PATH": os.environ["PATH"], "POSTGRES_PASSWORD_FILE": str(secret)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "correct horse"


def test_no_module_of_api_db_or_search_loads_torch_or_ray():
    script = """
import importlib, pkgutil, sys
for room in ("search", "db", "api"):
    package = importlib.import_module(room)
    for module in pkgutil.walk_packages(package.__path__, f"{room}."):
        if ".migrations." not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
loaded = {"torch", "ray", "transformers", "cupy"} & set(sys.modules)
sys.exit(f"loaded: {loaded}" if loaded else 0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_make_help_lists_the_documented_targets():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "up", "test", "check", "bench-search", "bench-service"):
        assert f"make {target} " in listed


def test_continuous_integration_script_is_valid_shell():
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True)


def test_every_setting_is_documented_and_every_documented_setting_exists():
    sources = [path.read_text() for room in ("api", "db", "search", "workers") for path in (ROOT / room).rglob("*.py")]
    used = set(re.findall(r"BITFRONTIER_[A-Z_]*[A-Z]", "\n".join(sources)))
    used |= {f"BITFRONTIER_{name.upper()}" for name in Settings.model_fields}
    table = (ROOT / "docs" / "operations.md").read_text().partition("\n## Settings\n")[2]
    documented = set(re.findall(r"`(BITFRONTIER_[A-Z_]+)`", table))
    assert documented == used - {"BITFRONTIER_EMULATOR"}, "the emulator's is a macro of its C++ code"


def promises():
    """path::name of each test that docs/guarantees.md names."""
    return re.findall(r"`(tests/[\w/.]+\.py)::(\w+)`", (ROOT / "docs" / "guarantees.md").read_text())


def test_guarantees_are_held_by_tests_that_exist():
    assert len(promises()) > 20
    for path, name in promises():
        assert re.search(rf"^ *(async )?def {name}\(", (ROOT / path).read_text(), re.M), f"{path} has no {name}"
