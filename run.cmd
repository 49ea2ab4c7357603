@echo off
rem run.cmd [server flags]         installs what is missing into .venv, then starts the server
rem run.cmd test [pytest flags]    the same for the tests
rem This finds a Python, %PYTHON%, py -3 or python, and run.py does the rest.
setlocal EnableExtensions DisableDelayedExpansion
set "found="
if defined PYTHON goto chosen
call :try py -3
if not defined found call :try python
if not defined found goto missing

:start
%found% "%~dp0run.py" %*
set "status=%errorlevel%"
goto end

:chosen
call :try "%PYTHON:"=%"
if not defined found call :try %PYTHON%
if defined found goto start
>&2 echo run: Python 3.10 or newer is needed, and PYTHON names none: "%PYTHON:"=%"
set "status=1"
goto end

:try
%* -c "import sys; sys.exit(sys.version_info < (3, 10))" >nul 2>&1
if not errorlevel 1 set found=%*
exit /b

:missing
>&2 echo run: Python 3.10 or newer was not found: install it from https://www.python.org/downloads/, then start again
set "status=1"
python -c "" >nul 2>&1
if not %errorlevel%==9009 goto end
where /q python
if not errorlevel 1 >&2 echo run: the "python" here only leads to the Microsoft Store; "App execution aliases" in Settings turns it off

:end
rem Started by a double click, the window would close before anyone has read why.
if %status%==0 exit /b 0
set "self=%~f0"
setlocal EnableDelayedExpansion
set "line=!cmdcmdline:"=!"
set "line=!line:* /c =!"
if /i "!line!"=="!self! " pause
if /i "!line!"=="!self!" pause
exit /b %status%
