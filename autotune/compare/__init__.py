"""One model, plan or transform against another: experiments, offline or on live traffic, and checks for CI."""
