"""Search over HTTP: the app, the process that follows the current release, the client, the page.

`app` is the interface, `process` opens each new release beside the old one and swaps them, `client` asks a
running service and needs nothing else of namr but the words of an answer.
"""
