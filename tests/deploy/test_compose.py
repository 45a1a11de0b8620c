"""What docker-compose.yml, the Dockerfile and Grafana's provisioning promise, checked without an engine."""

import re
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Final

import pytest

from tests.deploy.compose_file import REQUIRED, ROOT, fill_in, read, variables_of

IMAGES: Final = {
    "postgres": r"postgres:16-alpine",
    "redis": r"redis:7-alpine",
    "influxdb": r"influxdb:2\.7-alpine",
    "grafana": r"grafana/grafana-oss:\d+\.\d+\.\d+",
}
GRPC_PORTS: Final = {
    "gateway": 50050,
    "cache": 50051,
    "timeseries": 50052,
    "metadata": 50053,
    "simulator": 50054,
    "analytics": 50055,
}
MODULES: Final = {name: name if name == "gateway" else f"services.{name}" for name in GRPC_PORTS}
PUBLISHED: Final = {"127.0.0.1:8080:8080", "127.0.0.1:50050:50050", "127.0.0.1:3030:3000"}
IMAGE_USER: Final = "10001:10001"
ONE_SHOT: Final = "tls"

COMPOSE: Final = read(ROOT / "docker-compose.yml")
SERVICES: Final[dict[str, Any]] = COMPOSE["services"]
LONG_RUNNING: Final = sorted(SERVICES.keys() - {ONE_SHOT})
DOCKERFILE: Final = (ROOT / "Dockerfile").read_text()


def instructions(name: str) -> list[str]:
    """The arguments of every instruction of that name in the Dockerfile, continued lines joined."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in joined.splitlines() if line.split(maxsplit=1)[:1] == [name]]


def test_every_process_and_every_store_is_there_and_nothing_else() -> None:
    assert SERVICES.keys() == {*IMAGES, *GRPC_PORTS, ONE_SHOT}
    for name, pattern in IMAGES.items():
        assert re.fullmatch(pattern, SERVICES[name]["image"])
    ours = {SERVICES[name]["image"] for name in (*GRPC_PORTS, ONE_SHOT)}
    assert len(ours) == 1
    assert [name for name in SERVICES if "build" in SERVICES[name]] == [ONE_SHOT]
    for name, module in MODULES.items():
        assert SERVICES[name]["command"] == [module]
        assert (ROOT / module.replace(".", "/") / "__main__.py").is_file()


def test_every_variable_is_made_by_make_env_and_asked_for_when_missing() -> None:
    used = variables_of((ROOT / "docker-compose.yml").read_text())
    script = (ROOT / "deploy/compose/make-env").read_text()
    made = set(re.findall(r"^  ([A-Z_]+):\d+$", script, re.MULTILINE))
    assert used.keys() == made
    assert set().union(*used.values()) == {REQUIRED}


def test_a_variable_without_its_message_is_noticed() -> None:
    with pytest.raises(AssertionError):
        fill_in("${SECRET}", {"SECRET": "x"})
    with pytest.raises(KeyError):
        fill_in("${SECRET:?say so}", {})


def test_no_secret_is_written_down() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|TOKEN|SECRET|AUTH$", variable):
                assert re.fullmatch(r"\$\{\w+:\?[^}]*\}", value), f"{name}: {variable}"
            if "://" in value and "@" in value:
                assert re.search(r"://\w*:\$\{\w+:\?[^}]*\}@", value), f"{name}: {variable}"
        assert "${" not in str(service.get("command", "")), "an argument can be read by every user of the host"


def test_only_loopback_ports_of_the_three_doors_are_published() -> None:
    published = {name: set(service["ports"]) for name, service in SERVICES.items() if "ports" in service}
    assert published.keys() == {"gateway", "grafana"}
    assert set().union(*published.values()) == PUBLISHED
    assert not any("host" in str(service.get("network_mode")) for service in SERVICES.values())


def test_stores_and_inner_services_have_no_way_out() -> None:
    networks = COMPOSE["networks"]
    assert {name for name, network in networks.items() if network.get("internal") is not True} == {"edge"}
    joined = {name: set(service.get("networks", [])) for name, service in SERVICES.items()}
    assert {name for name in SERVICES if "edge" in joined[name]} == {"gateway", "grafana"}
    assert {name for name in SERVICES if "stores" in joined[name]} == {
        *("postgres", "redis", "influxdb"),
        *("metadata", "cache", "timeseries", "grafana"),
    }
    assert {name for name in SERVICES if "services" in joined[name]} == GRPC_PORTS.keys()


@pytest.mark.parametrize("name", GRPC_PORTS)
def test_a_process_listens_where_the_others_dial(name: str) -> None:
    environment = SERVICES[name]["environment"]
    variable = "GATEWAY_GRPC_ADDRESS" if name == "gateway" else f"{name.upper()}_ADDRESS"
    assert environment[variable] == f"0.0.0.0:{GRPC_PORTS[name]}"
    assert SERVICES[name]["healthcheck"]["test"] == ["CMD", "python", "/app/healthcheck.py", variable]
    targets = {key: value for key, value in environment.items() if key.endswith("_TARGET")}
    assert targets == {
        f"{peer.upper()}_TARGET": f"{peer}:{port}" for peer, port in GRPC_PORTS.items() if peer != "gateway"
    }


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_a_service_is_watched_limited_and_started_again(name: str) -> None:
    service = SERVICES[name]
    check = service["healthcheck"]
    assert check["test"][0] in {"CMD", "CMD-SHELL"} and len(check["test"]) > 1
    assert {"interval", "timeout", "retries", "start_period"} <= check.keys()
    assert service["restart"] == "unless-stopped"
    limits = service["deploy"]["resources"]["limits"]
    assert re.fullmatch(r"\d+[MG]", limits["memory"]) and limits["pids"] >= 64
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_nothing_starts_before_what_it_needs_is_healthy() -> None:
    needs: dict[str, dict[str, Any]] = {name: SERVICES[name].get("depends_on", {}) for name in SERVICES}
    for name, dependencies in needs.items():
        for dependency, how in dependencies.items():
            one_shot = "service_completed_successfully"
            expected = one_shot if dependency == ONE_SHOT else "service_healthy"
            assert how == {"condition": expected}, f"{name} -> {dependency}"
    for name in GRPC_PORTS:
        assert ONE_SHOT in needs[name], name
    stores = {"cache": "redis", "timeseries": "influxdb", "metadata": "postgres", "grafana": "influxdb"}
    assert all(store in needs[name] for name, store in stores.items())
    assert {"cache", "timeseries", "metadata"} <= needs["gateway"].keys() & needs["simulator"].keys()
    assert len(list(TopologicalSorter(needs).static_order())) == len(SERVICES)  # CycleError otherwise


@pytest.mark.parametrize("name", GRPC_PORTS)
def test_our_containers_can_do_little(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == IMAGE_USER == instructions("USER")[-1]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["volumes"] == [f"{name}-data:/data", "tls:/tls:ro"]
    assert service["environment"]["DATA_DIR"] == "/data"


def test_secrets_go_to_those_who_need_them_only() -> None:
    holders = {
        variable: {name for name in SERVICES if variable in str(SERVICES[name].get("environment", ""))}
        for variable in variables_of((ROOT / "docker-compose.yml").read_text())
    }
    assert holders == {
        "SERVICE_SECRET": set(GRPC_PORTS),
        "GATEWAY_TOKEN": {"gateway"},
        "POSTGRES_PASSWORD": {"postgres", "metadata"},
        "REDIS_PASSWORD": {"redis", "cache"},
        "INFLUXDB_TOKEN": {"influxdb", "timeseries", "grafana"},
        "INFLUXDB_PASSWORD": {"influxdb"},
        "GRAFANA_PASSWORD": {"grafana"},
    }


def test_the_key_is_handed_over_by_a_container_that_can_do_nothing_else() -> None:
    service = SERVICES[ONE_SHOT]
    assert service["command"] == ["/host", "/tls", IMAGE_USER]
    assert service["entrypoint"] == ["/bin/sh", "/app/install-tls"]
    assert service["cap_drop"] == ["ALL"] and service["cap_add"] == ["CHOWN", "DAC_READ_SEARCH"]
    assert service["network_mode"] == "none" and service["read_only"] is True and service["restart"] == "no"
    source = service["volumes"][0]
    assert source["source"] == "./deploy/compose/tls" and source["read_only"] is True
    assert source["bind"]["create_host_path"] is False, "Docker would make an empty folder of root's"


def test_every_volume_is_named_and_used() -> None:
    used = set()
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            if source.startswith("."):
                assert source == "./deploy/compose/tls" or (ROOT / source).is_dir()
            else:
                used.add(source)
    assert used == COMPOSE["volumes"].keys()


def test_the_stores_are_set_up_as_the_services_expect_them() -> None:
    influx, timeseries = SERVICES["influxdb"]["environment"], SERVICES["timeseries"]["environment"]
    assert influx["DOCKER_INFLUXDB_INIT_MODE"] == "setup"
    assert timeseries["INFLUXDB_URL"] == "http://influxdb:8086"
    assert influx["DOCKER_INFLUXDB_INIT_ORG"] == timeseries["INFLUXDB_ORG"] == "openmanager"
    assert influx["DOCKER_INFLUXDB_INIT_BUCKET"] == timeseries["INFLUXDB_BUCKET"] == "metrics"
    assert influx["DOCKER_INFLUXDB_INIT_ADMIN_TOKEN"] == timeseries["INFLUXDB_TOKEN"]
    postgres = SERVICES["postgres"]["environment"]
    url = fill_in(SERVICES["metadata"]["environment"]["DATABASE_URL"], {"POSTGRES_PASSWORD": "p"})
    assert url == f"postgresql://{postgres['POSTGRES_USER']}:p@postgres:5432/{postgres['POSTGRES_DB']}"
    redis = SERVICES["redis"]["command"]
    assert redis[redis.index("--appendonly") + 1] == "yes"


def test_grafana_is_given_the_history() -> None:
    (mount,) = [item for item in SERVICES["grafana"]["volumes"] if item.startswith(".")]
    source, target, options = mount.split(":")
    assert target == "/etc/grafana/provisioning/datasources" and "ro" in options.split(",")
    (datasource,) = read(ROOT / source / "influxdb.yml")["datasources"]
    timeseries = SERVICES["timeseries"]["environment"]
    assert datasource["type"] == "influxdb" and datasource["url"] == timeseries["INFLUXDB_URL"]
    assert datasource["jsonData"]["organization"] == timeseries["INFLUXDB_ORG"]
    assert datasource["jsonData"]["defaultBucket"] == timeseries["INFLUXDB_BUCKET"]
    assert datasource["secureJsonData"] == {"token": "$INFLUXDB_TOKEN"}
    assert "INFLUXDB_TOKEN" in SERVICES["grafana"]["environment"]


def test_the_image_is_small_in_rights_and_names_no_index() -> None:
    bases = {source.split()[0] for source in instructions("FROM")}
    assert bases == {"python:3.11-slim-bookworm"} and len(instructions("FROM")) == 2
    assert "--require-hashes" in DOCKERFILE and "--no-cache-dir" in DOCKERFILE
    assert not re.search(r"https?://|index-url|trusted-host|apt-get|curl|^ADD|^ARG", DOCKERFILE, re.MULTILINE)
    assert "PYTHONPATH=/app:/app/gen" in DOCKERFILE
    assert instructions("ENTRYPOINT") == ['["python", "-m"]']


def test_the_build_sees_what_it_copies_and_nothing_more() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied: set[str] = set()
    for arguments in instructions("COPY"):
        if not arguments.startswith("--from="):
            copied.update(arguments.split()[:-1])
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"launcher", "tests", "client", "bench"}
    assert packages <= copied | {"tools", "gen"}, "a package of the product that the image lacks"


def test_what_make_env_writes_is_never_committed() -> None:
    ignored = Path(ROOT / ".gitignore").read_text().split()
    assert {".env", "/deploy/compose/tls/", "/deploy/compose/.make-env/"} <= set(ignored)
