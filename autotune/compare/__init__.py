"""Compares one model, plan or transform with another: experiments, offline or on live traffic, and checks for CI."""
