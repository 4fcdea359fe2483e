"""What runs is what was installed, wherever `lorry` is called: the working directory is nobody's code."""

import sysconfig
from pathlib import Path

import lorry
from tests.conftest import MODEL, Server, start_server
from tests.service.test_training import datum

LORRY = Path(sysconfig.get_path("scripts")) / "lorry"


async def trains(server: Server) -> bool:
    async with lorry.connect(server.address, api_key=server.new_key("visitor")) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=2)
        return (await training.forward([datum()], "cross_entropy")).metrics["loss:sum"] > 0


async def test_modules_in_the_working_directory_are_not_imported(tmp_path: Path) -> None:
    folder, marker = tmp_path / "hostile", tmp_path / "was-imported"
    (folder / "lorry").mkdir(parents=True)
    for module in ("lorry/__init__.py", "torch.py", "msgpack.py"):
        (folder / module).write_text(f"open({str(marker)!r}, 'w')\nraise ImportError('from the working directory')\n")
    server = start_server(tmp_path / "data", "--http", "127.0.0.1:0", command=[str(LORRY)], folder=folder)
    try:
        assert await trains(server)
        assert not marker.exists()
    finally:
        server.stop()
