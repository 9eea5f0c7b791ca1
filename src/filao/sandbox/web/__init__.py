"""The sandbox in a browser."""

from importlib import import_module

from filao.extras import Extra

with Extra("filao[web]", of="the sandbox's page, unlike `filao sandbox --terminal`,"):
    import_module("starlette")
    import_module("uvicorn")
    import_module("websockets")  # of all modules here
