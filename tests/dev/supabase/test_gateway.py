"""The one port of the stand-in."""

import asyncio
import socket

from daemon.dev.supabase.gateway import listen


async def test_responses_are_sent_without_delay() -> None:
    delayed = asyncio.Queue[bool]()

    async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        delayed.put_nowait(not connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    listening = listen(0)
    async with await asyncio.start_server(connected, sock=listening):
        _, writer = await asyncio.open_connection(*listening.getsockname())
        assert await delayed.get() is False
        writer.close()
