"""Settings: where they come from, which wins, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from service.settings import InvalidSettingsError, Settings, known_names

VALUES: dict[str, tuple[str, Any]] = {
    "HOST": ("0.0.0.0", "0.0.0.0"),  # noqa: S104 - only read
    "PORT": ("8001", 8001),
    "DATA_DIR": ("/srv/data", Path("/srv/data")),
    "WEIGHTS": ("/srv/w.safetensors", "/srv/w.safetensors"),
    "DEVICE": ("cuda:1", "cuda:1"),
    "PRECISION": ("bf16", "bf16"),
    "RUNTIME": ("torch", "torch"),
    "DECODERS": ("0", 0),
    "FRAMES_PER_TRACKLET": ("8", 8),
    "SAMPLING": ("all", "all"),
    "INDEX": ("IVF64,Flat", "IVF64,Flat"),
    "STORAGE": ("float16", "float16"),
    "BATCH__MAX_FRAMES": ("32", 32),
    "BATCH__MAX_DELAY_MS": ("5.5", 5.5),
    "QUEUE__MAX_TRACKLETS": ("9", 9),
    "QUEUE__DEADLINE_S": ("1.5", 1.5),
    "LIMITS__FRAMES": ("100", 100),
    "LIMITS__FILE_BYTES": ("1000", 1000),
    "LIMITS__REQUEST_BYTES": ("2000", 2000),
    "LIMITS__FRAME_PIXELS": ("3000", 3000),
    "LIMITS__SIDE_PIXELS": ("16", 16),
    "LIMITS__METADATA_BYTES": ("99", 99),
    "LIMITS__UPLOADS": ("2", 2),
    "LIMITS__UPLOAD_S": ("7", 7.0),
    "LIMITS__SEARCHES": ("3", 3),
    "LIMITS__WRITES": ("5", 5),
    "LIMITS__CONNECTIONS": ("50", 50),
    "QUALITY__MIN_FRAMES": ("3", 3),
    "QUALITY__MIN_SIDE_PIXELS": ("32", 32),
    "QUALITY__MIN_SHARPNESS": ("9.5", 9.5),
    "QUALITY__MIN_BRIGHTNESS": ("0.1", 0.1),
    "QUALITY__MAX_BRIGHTNESS": ("0.9", 0.9),
    "QUALITY__MAX_FRAME_DISTANCE": ("0.7", 0.7),
    "RETENTION_DAYS": ("30", 30.0),
    "THRESHOLD": ("11.2", 11.2),
    "THUMBNAILS": ("false", False),
    "KEEP_FRAMES": ("true", True),
    "CORS_ORIGINS": ("https://a.example, http://b:81", ("https://a.example", "http://b:81")),
    "TRUSTED_PROXIES": ("10.0.0.7, fd00::/8", ("10.0.0.7", "fd00::/8")),
    "OTLP_ENDPOINT": ("http://collector:4318", "http://collector:4318"),
    "AUDIT__ENABLED": ("false", False),
    "AUDIT__FILE_BYTES": ("100000", 100_000),
    "AUDIT__FILES": ("3", 3),
    "FIRST_KEY": ("true", True),
    "INSECURE": ("true", True),
    "RATE_LIMIT": ("600", 600),
    "LOG_FORMAT": ("json", "json"),
    "SHUTDOWN_GRACE_S": ("3", 3.0),
}


def value_of(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.lower().split("__"):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", VALUES)
def test_each_setting_is_a_variable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, expected = VALUES[name]
    default = value_of(Settings.load(), name)
    monkeypatch.setenv(f"PASSERBY_{name}", text)

    loaded = value_of(Settings.load(), name)

    assert loaded == expected
    assert loaded != default


@pytest.mark.parametrize("name", VALUES)
def test_each_setting_is_a_flag_that_wins_over_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text, expected = VALUES[name]
    other = value_of(Settings(), name)
    if other is not None:
        monkeypatch.setenv(f"PASSERBY_{name}", str(other))
    flag = "--" + name.lower().replace("__", ".").replace("_", "-")
    switches = {
        "THUMBNAILS": "--no-thumbnails",
        "KEEP_FRAMES": "--keep-frames",
        "AUDIT__ENABLED": "--no-audit.enabled",
        "FIRST_KEY": "--first-key",
        "INSECURE": "--insecure",
    }
    flags = [switches[name]] if name in switches else [flag, text]

    assert value_of(Settings.load(flags), name) == expected


def test_every_known_name_is_tested_here() -> None:
    tested = {f"PASSERBY_{name}" for name in VALUES}

    assert known_names() == tested | {"PASSERBY_API_KEYS", "PASSERBY_API_KEYS_FILE"}


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = Settings.load()

    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.data_dir == Path("data")
    assert settings.weights == "bundled"
    assert (settings.device, settings.precision) == ("auto", "auto")
    assert (settings.frames_per_tracklet, settings.sampling) == (15, "even")
    assert settings.index == "Flat"
    assert settings.thumbnails
    assert settings.api_keys == ()
    assert settings.threshold is None


@pytest.mark.parametrize("name", ["PASSERBY_PROT", "passerby_prot", "PASSERBY_BATCH__FRAMES",
                                  "PASSERBY_BATCH", "PASSERBY_"])  # fmt: skip
def test_an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")

    with pytest.raises(InvalidSettingsError, match=name):
        Settings.load()


@pytest.mark.parametrize(
    ("name", "text"),
    [("PORT", "eighty"), ("PORT", "70000"), ("PRECISION", "int8"), ("THRESHOLD", "nan"),
     ("THRESHOLD", "-1"), ("BATCH__MAX_FRAMES", "0"), ("QUEUE__DEADLINE_S", "0"),
     ("LIMITS__FRAMES", "many"), ("LOG_FORMAT", "xml"), ("THUMBNAILS", "perhaps"),
     ("WEIGHTS", ""), ("CORS_ORIGINS", "*"), ("CORS_ORIGINS", "https://a.example/x"),
     ("TRUSTED_PROXIES", "proxy"), ("TRUSTED_PROXIES", "*"), ("OTLP_ENDPOINT", "collector")],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(f"PASSERBY_{name}", text)

    with pytest.raises(InvalidSettingsError, match=f"PASSERBY_{name}"):
        Settings.load()


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Settings.load(["--prot", "1"])

    assert "--prot" in capsys.readouterr().err


def test_no_flags_do_not_mean_those_of_the_running_program(monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["pytest", "--port", "1234"])

    assert Settings.load().port == 8000


def keys(settings: Settings) -> list[str]:
    return [key.get_secret_value() for key in settings.api_keys]


@pytest.mark.parametrize("text", ["one,two", "one, two", "one two", "one,two,"])
def test_keys_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PASSERBY_API_KEYS", text)

    assert keys(Settings.load()) == ["one", "two"]


def test_keys_can_be_a_flag() -> None:
    assert keys(Settings.load(["--api-keys", "one,two"])) == ["one", "two"]


@pytest.mark.parametrize("name", ["PASSERBY_API_KEYS_FILE", "passerby_api_keys_file"])
def test_keys_can_come_from_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """In either spelling: a name that is accepted and not read would leave the service open."""
    path = tmp_path / "keys"
    path.write_text("one\ntwo\n", encoding="utf-8")
    monkeypatch.setenv(name, str(path))

    assert keys(Settings.load()) == ["one", "two"]


@pytest.mark.parametrize("content", ["", "\n", None, b"\xff\xfe\x00"])
def test_a_key_file_without_keys_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | bytes | None
) -> None:
    """Who mounts a secret means to lock the door; an empty one must not leave it open."""
    path = tmp_path / "keys"
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("PASSERBY_API_KEYS_FILE", str(path))

    with pytest.raises(InvalidSettingsError, match="PASSERBY_API_KEYS_FILE"):
        Settings.load()


@pytest.mark.parametrize("name", ["PASSERBY_API_KEYS", "passerby_api_keys"])
def test_keys_in_two_places_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "keys"
    path.write_text("one", encoding="utf-8")
    monkeypatch.setenv(name, "two")
    monkeypatch.setenv("PASSERBY_API_KEYS_FILE", str(path))

    with pytest.raises(InvalidSettingsError, match="both"):
        Settings.load()


def test_keys_do_not_show_when_settings_are_printed() -> None:
    settings = Settings.load(["--api-keys", "hush-hush"])

    shown = f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"

    assert "hush" not in shown


def test_a_bad_value_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a secret in the wrong place."""
    monkeypatch.setenv("PASSERBY_PORT", "hush-hush")

    with pytest.raises(InvalidSettingsError) as caught:
        Settings.load()

    assert "hush" not in str(caught.value)
