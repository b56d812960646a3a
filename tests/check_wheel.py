"""Run in a clean environment that has the wheel and nothing of the repository: `python check_wheel.py WHEEL`."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path


def main(wheel: str) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "fluidmcp_proxy/py.typed" in names
    assert "fluidmcp_proxy/process/guardian.py" in names
    for name in ("page.html", "page.css", "page.js"):
        assert f"fluidmcp_proxy/gateway/static/{name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names), names
    outside = [name for name in names if not name.startswith(("fluidmcp_proxy/", "fluidmcp_proxy-"))]
    assert outside == [], outside
    assert not [name for name in names if name.endswith(".pth")]

    scripts = Path(sysconfig.get_path("scripts"))
    for command in ([str(scripts / "fluidmcp"), "--version"], [sys.executable, "-m", "fluidmcp_proxy", "--help"]):
        output = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout
        assert "fluidmcp" in output, output
    audit = Path(__file__).with_name("audit_import.py").resolve()
    effects = subprocess.run([sys.executable, "-I", audit], cwd="/", capture_output=True, text=True, check=True).stdout
    assert effects == "", effects
    code = "import fluidmcp_proxy; print(fluidmcp_proxy.__file__)"
    where = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd="/", capture_output=True, text=True, check=True
    ).stdout
    assert "site-packages" in where, where
    print(f"{Path(wheel).name}: {len(names)} files, imports without side effects")


if __name__ == "__main__":
    main(sys.argv[1])
