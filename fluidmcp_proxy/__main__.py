"""``python -m fluidmcp_proxy`` is ``fluidmcp``."""

from fluidmcp_proxy.cli import main

if __name__ == "__main__":
    main(prog_name="fluidmcp")
