"""The fluid network: transfers as flows that share links max-min fairly, in virtual time, without asyncio.

`fluid.FluidNetwork` is the door, `topology` says what the links are. Behind it: `filling` is the definition of the
rates in plain Python, `maxmin` finds the same rates by repairing only what a change touches.
`events` and `flows` say what happens when, `heap` what happens next, `layout` the arrays that all of them work on;
`compiling` and `entries` make machine code of it.
"""
