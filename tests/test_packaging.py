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

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
WORKERS_ONLY = {"torch", "ray", "transformers", "safetensors", "gguf", "accelerate", "huggingface-hub", "pillow"}


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


def test_postgres_is_waited_for_and_its_data_kept():
    postgres = SERVICES["postgres"]
    assert postgres["image"] == "postgres:18"
    assert "pg_isready" in postgres["healthcheck"]["test"]
    assert postgres["volumes"] == ["postgres:/var/lib/postgresql"]
    for name in ("api", "worker"):
        assert SERVICES[name]["depends_on"]["postgres"] == {"condition": "service_healthy"}


def test_secrets_come_from_files():
    assert all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())
    for name, service in SERVICES.items():
        for variable, value in service["environment"].items():
            if "PASSWORD" in variable or "TOKEN" in variable:
                assert variable.endswith(("_FILE", "_PATH")), f"{name} is given {variable} in the clear"
                assert Path(value).name in service["secrets"]
        assert not re.search(r"://[^@/]*:[^@/]*@", str(service["environment"]))


def test_only_the_api_is_reached_from_outside_and_only_from_this_machine():
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"api"}
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["api"]["ports"])
    assert COMPOSE["networks"]["data"]["internal"]
    assert COMPOSE["networks"]["ray"]["internal"]


def test_ray_asks_for_its_token_and_is_optional():
    for name in ("worker", "ray-head", "ray-worker"):
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert "ray_token" in SERVICES[name]["secrets"]
    assert SERVICES["ray-head"]["profiles"] == SERVICES["ray-worker"]["profiles"] == ["ray"]


def test_our_containers_run_without_privileges():
    for name, service in SERVICES.items():
        if name != "postgres":
            assert service["user"] == "bitfrontier"
            assert service["cap_drop"] == ["ALL"]


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
    for target in ("demo", "up", "test", "check", "bench-search"):
        assert f"make {target} " in listed


def test_continuous_integration_script_is_valid_shell():
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True)
